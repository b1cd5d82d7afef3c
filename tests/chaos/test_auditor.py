"""The auditor: silent on a healthy store however busy it was, and exact about what is damaged by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import msgpack
import pytest

from redisflow import (
    ExternalEvent,
    Flow,
    FlowError,
    FlowEvent,
    FlowManager,
    Manual,
    NewFlow,
    StepObservation,
    StepRuntime,
    Timer,
    WaitEngine,
)
from redisflow.keys import Keyspace
from tests.chaos.auditor import audit
from tests.chaos.findings import Acknowledged, Damage, Finding
from tests.support.resends import IDENTITY
from tests.support.servers import ENGINES, Server

if TYPE_CHECKING:
    import redis

FAR_OFF = datetime(2100, 1, 1, tzinfo=UTC)
AGO = datetime(2001, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


@attrs.frozen
class Store:
    """A namespace of its own, and flows in it by name."""

    raw: redis.Redis
    manager: FlowManager
    prefix: str
    keyspace: Keyspace
    flows: dict[str, Flow]

    def key(self, kind: str, name: str) -> bytes:
        """The hash, the events or the steps of a flow."""
        flow = self.flows[name]
        made: bytes = getattr(self.keyspace.partition_of(flow.id), kind)(str(flow.id).encode())
        return made

    def status(self, name: str, status: str | None = None) -> bytes:
        """The set of a status, by default its own, in the flow's partition."""
        flow = self.flows[name]
        return self.keyspace.partition_of(flow.id).status(flow.status if status is None else type(flow.status)(status))

    def owner(self, name: str) -> bytes:
        """The set of the flow's owner."""
        flow = self.flows[name]
        return self.keyspace.partition_of(flow.id).owner(flow.owner_session_key.encode())

    def due(self, name: str) -> bytes:
        """What is due in the flow's partition."""
        return self.keyspace.partition_of(self.flows[name].id).due

    def waiters(self, name: str) -> bytes:
        """Who waits in the flow's partition."""
        return self.keyspace.partition_of(self.flows[name].id).waiters

    def entries(self, name: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """A trail as it is stored, oldest first."""
        stored: Any = self.raw.xrange(self.key("events", name))
        return list(stored)

    def rewrite(self, name: str, edit: Callable[[list[dict[bytes, bytes]]], object]) -> None:
        """Replace a trail by an edited one; the ids stay in order."""
        key = self.key("events", name)
        entries = [fields for _, fields in self.entries(name)]
        edit(entries)
        self.raw.delete(key)
        for number, fields in enumerate(entries, 1):
            self.raw.xadd(key, fields, id=f"{number}-0")  # type: ignore[arg-type]  # a dict is invariant

    def audit(self, *acknowledged: Acknowledged, event_maxlen: int | None = None) -> list[Finding]:
        """Audit it."""
        return audit([self.raw], self.prefix, acknowledged, event_maxlen=event_maxlen)


def populated(flows: FlowManager) -> dict[str, Flow]:
    """Flows of all kinds."""

    def running(**options: Any) -> Flow:
        return flows.start_running(flows.create_managed(**IDENTITY, **{"state": {"n": 0, "kept": [1]}, **options}))

    changed = flows.update_state(running(), {"a": 1, "b": {"x": [True, None]}}, increment={"n": 3}, next_step="two")
    changed = flows.update_state(changed, {"a": 2}, unset=["b"])
    flows.append_event(changed, "note", {"by": "hand"})
    stepped = running()
    for status in ("running", "succeeded"):
        flows.record_step_observation(StepObservation(stepped, "run", "task", status, child_session_key="c"))
    flows.record_step_observation(StepObservation(stepped, "other", "task", "failed"), runtime=StepRuntime.MANAGED)
    rewritten = attrs.evolve(running(), state={"other": 1}, current_step="rewritten")
    event = ExternalEvent("topic", "c-1", deadline=FAR_OFF)
    return {
        "created": flows.create_managed(**IDENTITY),
        "changed": changed,
        "mirrored": flows.create_mirrored(**IDENTITY, state=["no", "mapping"]),
        "replaced": flows.update_state(flows.update_state(running(), ["whole"]), {"again": 1}),
        "whole": flows.update_state(flows.update_state(running(), increment={"n": 1}), "whole"),
        "timer": flows.set_waiting(running(), Timer(at=FAR_OFF)),
        "event": flows.set_waiting(running(), event),
        "manual": flows.set_waiting(running(), Manual()),
        "own": flows.set_waiting(running(), {"kind": "my own", "at": 7}),
        "resumed": flows.resume(flows.set_waiting(running(), event), {"approved": True}),
        "to cancel": flows.request_cancel(flows.set_waiting(running(), Timer(at=FAR_OFF))),
        "stepped": flows.get(stepped) or stepped,
        "rewritten": flows.update_and_append(rewritten, "rewritten")[0],
        "finished": flows.finish(running(), {"done": True}),
        "failed": flows.fail(running(), "broken"),
        "cancelled": flows.cancel(flows.request_cancel(running())),
        "{owner}": flows.create_managed(**{**IDENTITY, "owner_session_key": "{a}:\0\n*"}),
    }


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    """A healthy store."""
    prefix = f"t{uuid4().hex}"
    with FlowManager.from_url(server.url, prefix=prefix) as flows:
        yield Store(server.client(), flows, prefix, Keyspace.of(prefix, 16), populated(flows))


# --- healthy stores --------------------------------------------------------------------------------------


def test_a_healthy_store_has_nothing_to_find(store: Store) -> None:
    """Every status, wait, verb and form of state; and every last change is found as it was acknowledged."""
    told = [Acknowledged(flow.id, flow.etag, flow.revision) for flow in store.flows.values()]
    assert store.audit(*told) == []


def busy(flows: FlowManager, chance: Random, ids: list[UUID]) -> list[Acknowledged]:
    """Do this and that to some flows, by any verb; return what was acknowledged of those that were never deleted."""
    engine, told = WaitEngine(flows), []
    waits: list[Any] = [Timer(at=AGO), Timer(at=FAR_OFF), ExternalEvent("t", "c"), Manual(deadline=FAR_OFF)]
    acts: dict[str, Callable[[UUID], Any]] = {
        "create": lambda i: flows.create_managed(**IDENTITY, flow_id=i, state={"n": 0}, exist_ok=True),
        "mirror": lambda i: flows.create_mirrored(**IDENTITY, flow_id=i, state={"n": 0}),
        "start": flows.start_running,
        "wait": lambda i: flows.set_waiting(i, chance.choice(waits)),
        "resume": lambda i: flows.resume(i, {"r": 1}),
        "patch": lambda i: flows.update_state(i, {chance.choice("ab"): chance.random()}, unset=["r"]),
        "add": lambda i: flows.update_state(i, increment={"n": 1}, next_step=chance.choice([None, "s"])),
        "note": lambda i: flows.append_event(i, "note"),
        "observe": lambda i: flows.record_step_observation(StepObservation(i, chance.choice("rs"), "t", "running")),
        "mutate": lambda i: flows.mutate(i, lambda f: attrs.evolve(f, state={"m": 1}), kind="mutated"),
        "event": lambda i: engine.try_resume_external(i, "t", "c", {"x": 1}),
        "finish": flows.finish,
        "fail": lambda i: flows.fail(i, "broken"),
        "request": flows.request_cancel,
        "cancel": flows.cancel,
        "tick": lambda _: engine.tick(),
        "many": lambda _: flows.create_many([NewFlow(**IDENTITY, state={"k": n}) for n in range(3)]),
        "delete": lambda i: i in ids[:2] and flows.delete(i),
    }
    often = {"patch": 4, "add": 6, "note": 2, "observe": 2, "create": 3, "start": 3, "wait": 3, "resume": 3}
    for act in chance.choices([*acts], [often.get(act, 1) for act in acts], k=400):
        with suppress(FlowError):
            answer = acts[act](chance.choice(ids))
            if isinstance(answer, FlowEvent):
                told.append(Acknowledged(answer.flow_id, answer.op_id, answer.revision, answer.kind))
            elif isinstance(answer, Flow):
                told.append(Acknowledged(answer.id, answer.etag, answer.revision))
    with flows.batch() as batch:
        queued = [batch.create_managed(**IDENTITY) for _ in range(5)]
        for creation in [flows.create_managed(**IDENTITY) for _ in range(5)]:
            batch.start_running(creation)
    told += [Acknowledged(one.result().id, one.result().etag, 0, "created") for one in queued]
    return [change for change in told if change.flow_id not in ids[:2]]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("event_maxlen", [None, 100])
def test_a_store_that_was_busy_has_nothing_to_find(engine: Any, event_maxlen: int | None) -> None:
    """Writers at once on the same flows, engines, deletions, trails trimmed: all that was acknowledged is there."""
    with (
        Server(engine) as server,
        FlowManager.from_url(server.url, prefix="busy", partitions=3, event_maxlen=event_maxlen) as flows,
        ThreadPoolExecutor(4) as pool,
    ):
        ids = [uuid4() for _ in range(50)]
        jobs = [pool.submit(busy, flows, Random(seed), ids) for seed in range(4)]
        told = [change for job in jobs for change in job.result(timeout=60)]
        long = flows.create_mirrored(**IDENTITY, state={"n": 0})
        with flows.batch() as batch:
            for _ in range(400):
                batch.update_state(long.id, increment={"n": 1})
        told += [Acknowledged(long.id, long.etag, 1, "started")]
        assert len(told) > 250
        assert audit([server.client()], "busy", told, event_maxlen=event_maxlen) == []
        entries = server.client().xlen(Keyspace.of("busy", 3).partition_of(long.id).events(str(long.id).encode()))
        assert entries == 402 if event_maxlen is None else entries < 250
        unbounded = {finding.damage for finding in audit([server.client()], "busy", told)}
        assert unbounded == (set() if event_maxlen is None else {Damage.GAP})


def test_a_namespace_may_lie_on_several_nodes(store: Store) -> None:
    """As the primaries of a cluster share it: what is on one of them belongs together with what is on the others."""
    with Server(ENGINES[0]) as another:
        client = another.client()
        for partition in store.keyspace.partitions[5:]:
            for key in store.raw.scan_iter(match=f"{{{partition.tag}}}:*"):
                client.restore(key, 0, store.raw.dump(key))  # type: ignore[arg-type]  # the key exists
                store.raw.delete(key)
        told = [Acknowledged(flow.id, flow.etag, flow.revision) for flow in store.flows.values()]
        assert client.dbsize() > 0
        assert audit([store.raw, client], store.prefix, told) == []
        assert {finding.damage for finding in audit([store.raw], store.prefix, told)} == {Damage.LOST}


def test_other_namespaces_are_not_looked_at(store: Store) -> None:
    """Not even one whose name begins with the same letters."""
    with FlowManager(store.raw, prefix=f"{store.prefix}-2") as flows:
        flow = flows.create_managed(**IDENTITY)
        store.raw.delete(Keyspace.of(f"{store.prefix}-2", 16).partition_of(flow.id).events(str(flow.id).encode()))
    assert store.audit() == []
    assert len(audit([store.raw], f"{store.prefix}-2")) == 1


# --- damaged stores --------------------------------------------------------------------------------------

Tamper = Callable[[Store], object]


def patched_hash(name: str, **fields: Any) -> Tamper:
    """Set fields of a flow's hash."""
    return lambda store: store.raw.hset(
        store.key("flow", name), items=[part for field in fields.items() for part in field]
    )


def patched_event(name: str, at: int, field: bytes, value: Any) -> Tamper:
    """Set one field of one event."""
    return lambda store: store.rewrite(name, lambda entries: entries[at].update({field: value}))


def removed_event(name: str, at: int) -> Tamper:
    """Take one event out."""
    return lambda store: store.raw.xdel(store.key("events", name), store.entries(name)[at][0])


def doubled(entries: list[dict[bytes, bytes]]) -> None:
    """The last change once more, as a resend that was not recognised leaves it."""
    entries.append({**entries[-1], b"rev": b"%d" % (int(entries[-1][b"rev"]) + 1)})


def applied_twice(store: Store) -> None:
    """The same, and the hash says so too."""
    store.rewrite("replaced", doubled)
    store.raw.hincrby(store.key("flow", "replaced"), "revision", 1)


def again(entries: list[dict[bytes, bytes]]) -> None:
    """Another operation made the same revision."""
    entries.append({**entries[-1], b"op": b"0" * 32})


def spread(store: Store) -> None:
    """An older hash of a flow lies in all the other partitions."""
    for partition in store.keyspace.partitions:
        key = partition.flow(member(store, "changed"))
        if key != store.key("flow", "changed"):
            raw: Any = store.raw
            raw.copy(store.key("flow", "changed"), key)
            store.raw.hset(key, "current_step", "one")


def never_seen(store: Store) -> None:
    """A step of a run that no event tells of."""
    steps = store.key("steps", "stepped")
    packed: Any = store.raw.hget(steps, "other")
    store.raw.hset(steps, "fresh", packed.replace(b"other", b"fresh"))


def ended_before(entries: list[dict[bytes, bytes]]) -> None:
    """A flow that was cancelled goes on."""
    entries[2] |= {b"kind": b"cancelled", b"payload": msgpack.packb({})}


PACKED = msgpack.packb
DAMAGES: dict[str, tuple[Damage, str | None, Tamper]] = {
    "no settings": (Damage.META, None, lambda s: s.raw.delete(f"{s.prefix}:meta")),
    "another layout": (Damage.META, None, lambda s: s.raw.hset(f"{s.prefix}:meta", "layout", 2)),
    "a key beside the settings": (Damage.UNKNOWN_KEY, None, lambda s: s.raw.set(f"{s.prefix}:lock", 1)),
    "a kind there is not": (Damage.UNKNOWN_KEY, None, lambda s: s.raw.set(s.due("timer") + b"x", 1)),
    "a status there is not": (Damage.UNKNOWN_KEY, None, lambda s: s.raw.zadd(s.status("changed") + b"x", {"m": 1})),
    "an id that is none": (Damage.UNKNOWN_KEY, None, lambda s: s.raw.hset(s.key("flow", "timer") + b"x", "a", 1)),
    "an id in capitals": (
        Damage.UNKNOWN_KEY,
        None,
        lambda s: s.raw.hset(s.keyspace.partitions[0].flow(b"6F9619FF-8B86-4D01-B42D-00C04FC964F3"), "a", 1),
    ),
    "events that are no stream": (
        Damage.WRONG_TYPE,
        "timer",
        lambda s: [s.raw.delete(s.key("events", "timer")), s.raw.set(s.key("events", "timer"), 1)],
    ),
    "a hash that is none": (
        Damage.WRONG_TYPE,
        "event",
        lambda s: [s.raw.delete(s.key("flow", "event")), s.raw.set(s.key("flow", "event"), 1)],
    ),
    "events elsewhere": (
        Damage.WRONG_PARTITION,
        "timer",
        lambda s: s.raw.rename(s.key("events", "timer"), elsewhere(s, "timer", "events")),
    ),
    "a hash elsewhere": (
        Damage.WRONG_PARTITION,
        "event",
        lambda s: s.raw.rename(s.key("flow", "event"), elsewhere(s, "event", "flow")),
    ),
    "a hash in every partition": (Damage.WRONG_PARTITION, "changed", spread),
    "a tag there is not": (
        Damage.WRONG_PARTITION,
        "stepped",
        lambda s: s.raw.rename(
            s.key("steps", "stepped"), b"{%b:99.0}:steps:%b" % (s.prefix.encode(), member(s, "stepped"))
        ),
    ),
    "an entry elsewhere": (
        Damage.WRONG_PARTITION,
        "{owner}",
        lambda s: s.raw.rename(
            s.owner("{owner}"), partition_beside(s, "{owner}").owner(s.flows["{owner}"].owner_session_key.encode())
        ),
    ),
    "a scratch key": (
        Damage.SCRATCH,
        None,
        lambda s: s.raw.xadd(s.keyspace.partitions[3].scratch, {"rev": 0, "kind": "created"}),
    ),
    "a hash that expires": (Damage.EXPIRY, "created", lambda s: s.raw.expire(s.key("flow", "created"), 1000)),
    "no hash": (Damage.ORPHAN, "event", lambda s: s.raw.delete(s.key("flow", "event"))),
    "no hash, but steps": (Damage.ORPHAN, "stepped", lambda s: s.raw.delete(s.key("flow", "stepped"))),
    "an entry that is no id": (Damage.ORPHAN, None, lambda s: s.raw.zadd(s.due("timer"), {"nobody": 1})),
    "a field missing": (Damage.FLOW, "changed", lambda s: s.raw.hdel(s.key("flow", "changed"), "goal")),
    "a field of nonsense": (Damage.FLOW, "timer", patched_hash("timer", revision="two")),
    "a value of nonsense": (Damage.FLOW, "changed", patched_hash("changed", **{"s:a": b"\xc1"})),
    "a field too many": (Damage.FLOW, "changed", patched_hash("changed", colour="red")),
    "a wait of one that runs": (Damage.FLOW, "changed", patched_hash("changed", wait=PACKED({"kind": "manual"}))),
    "no wait": (Damage.FLOW, "manual", lambda s: s.raw.hdel(s.key("flow", "manual"), "wait")),
    "half a wait": (Damage.FLOW, "event", patched_hash("event", wait=PACKED({"kind": "external_event"}))),
    "another waiter": (Damage.FLOW, "event", patched_hash("event", waiter=b"topic\0c-2\0")),
    "two states": (Damage.FLOW, "changed", patched_hash("changed", s=b"5")),
    "a flag that is 0": (Damage.FLOW, "changed", patched_hash("changed", cancel_requested=0)),
    "a payload of nonsense": (Damage.EVENT, "changed", patched_event("changed", 2, b"payload", b"\xc1")),
    "a payload of another kind": (Damage.EVENT, "failed", patched_event("failed", -1, b"payload", PACKED({}))),
    "an observation of nothing": (Damage.EVENT, "stepped", patched_event("stepped", -1, b"payload", PACKED([]))),
    "a step of nonsense": (Damage.STEP, "stepped", lambda s: s.raw.hset(s.key("steps", "stepped"), "run", b"\x90")),
    "a step under another run": (
        Damage.STEP,
        "stepped",
        lambda s: s.raw.hset(s.key("steps", "stepped"), "run", s.raw.hget(s.key("steps", "stepped"), "other") or b""),
    ),
    "no events": (Damage.GAP, "changed", lambda s: s.raw.delete(s.key("events", "changed"))),
    "the first event gone": (Damage.GAP, "changed", removed_event("changed", 0)),
    "an event gone": (Damage.GAP, "changed", removed_event("changed", 2)),
    "a revision twice": (Damage.GAP, "changed", patched_event("changed", 2, b"rev", 1)),
    "a revision back": (Damage.GAP, "changed", patched_event("changed", -1, b"rev", 1)),
    "a change that made no revision": (Damage.GAP, "finished", lambda s: s.rewrite("finished", again)),
    "the last event gone": (Damage.REVISION, "finished", removed_event("finished", -1)),
    "a revision too many": (Damage.REVISION, "finished", patched_hash("finished", revision=3)),
    "a change applied twice": (Damage.OP_TWICE, "replaced", applied_twice),
    "a note left twice": (
        Damage.OP_TWICE,
        "changed",
        lambda s: s.rewrite("changed", lambda entries: entries.append(dict(entries[-1]))),
    ),
    "another etag": (Damage.ETAG, "changed", patched_hash("changed", etag="0" * 32)),
    "another etag of one that was rewritten": (Damage.ETAG, "rewritten", patched_hash("rewritten", etag="0" * 32)),
    "a change of what had ended": (Damage.FORBIDDEN, "changed", lambda s: s.rewrite("changed", ended_before)),
    "a wait of what was never started": (
        Damage.FORBIDDEN,
        "manual",
        patched_event("manual", 1, b"kind", "state_updated"),
    ),
    "another value": (Damage.STATE, "changed", patched_hash("changed", **{"s:a": 7})),
    "a counter that is a word": (Damage.STATE, "changed", patched_hash("changed", **{"s:n": PACKED("x")})),
    "a value gone": (Damage.STATE, "changed", lambda s: s.raw.hdel(s.key("flow", "changed"), "s:a", "s:n")),
    "a value that was unset": (Damage.STATE, "changed", patched_hash("changed", **{"s:b": 1})),
    "a value from before the state was replaced": (Damage.STATE, "replaced", patched_hash("replaced", **{"s:kept": 1})),
    "another step": (Damage.STATE, "changed", patched_hash("changed", current_step="three")),
    "a flag from nowhere": (Damage.STATE, "changed", patched_hash("changed", cancel_requested=1)),
    "a flag lost": (Damage.STATE, "cancelled", lambda s: s.raw.hdel(s.key("flow", "cancelled"), "cancel_requested")),
    "another wait": (Damage.STATE, "manual", patched_hash("manual", wait=PACKED({"kind": "manual", "deadline": None}))),
    "another reason": (Damage.STATE, "failed", patched_hash("failed", **{"s:failure": PACKED({"reason": "x"})})),
    "a step gone": (Damage.STEPS, "stepped", lambda s: s.raw.hdel(s.key("steps", "stepped"), "run")),
    "a step that was never seen": (Damage.STEPS, "stepped", never_seen),
    "an observation gone": (
        Damage.STEPS,
        "stepped",
        lambda s: s.rewrite("stepped", lambda entries: entries.pop(-2)),
    ),
    "not in its status": (Damage.STATUS_SET, "timer", lambda s: s.raw.zrem(s.status("timer"), member(s, "timer"))),
    "in another status": (
        Damage.STATUS_SET,
        "timer",
        lambda s: s.raw.zadd(s.status("timer", "failed"), {member(s, "timer"): 1}),
    ),
    "in its status at another time": (
        Damage.STATUS_SET,
        "timer",
        lambda s: s.raw.zincrby(s.status("timer"), 1, member(s, "timer")),
    ),
    "not its owner's": (Damage.OWNER_SET, "{owner}", lambda s: s.raw.delete(s.owner("{owner}"))),
    "another owner's": (
        Damage.OWNER_SET,
        "timer",
        lambda s: s.raw.zadd(s.owner("timer") + b"x", {member(s, "timer"): 1}),
    ),
    "its owner's at another time": (
        Damage.OWNER_SET,
        "timer",
        lambda s: s.raw.zincrby(s.owner("timer"), -1, member(s, "timer")),
    ),
    "never due": (Damage.DUE, "timer", lambda s: s.raw.zrem(s.due("timer"), member(s, "timer"))),
    "due too late": (Damage.DUE, "timer", lambda s: s.raw.zincrby(s.due("timer"), 1e6, member(s, "timer"))),
    "due, and to be cancelled at once": (
        Damage.DUE,
        "to cancel",
        lambda s: s.raw.zadd(s.due("to cancel"), {member(s, "to cancel"): FAR_OFF.timestamp() * 1e6}),
    ),
    "due, and waits for nothing": (
        Damage.DUE,
        "resumed",
        lambda s: s.raw.zadd(s.due("resumed"), {member(s, "resumed"): 1}),
    ),
    "due, and nobody's business": (Damage.DUE, "own", lambda s: s.raw.zadd(s.due("own"), {member(s, "own"): 7})),
    "no waiter": (Damage.WAITERS, "event", lambda s: s.raw.delete(s.waiters("event"))),
    "a waiter that waits no more": (
        Damage.WAITERS,
        "resumed",
        lambda s: s.raw.zadd(s.waiters("resumed"), {b"topic\0c-1\0" + member(s, "resumed"): 0}),
    ),
    "a waiter with a score": (
        Damage.WAITERS,
        "event",
        lambda s: s.raw.zincrby(s.waiters("event"), 1, b"topic\0c-1\0" + member(s, "event")),
    ),
}


def member(store: Store, name: str) -> bytes:
    """A flow's id as sets have it."""
    return str(store.flows[name].id).encode()


def partition_beside(store: Store, name: str) -> Any:
    """A partition that is not the flow's."""
    return store.keyspace.partitions[(store.flows[name].id.int + 1) % len(store.keyspace.partitions)]


def elsewhere(store: Store, name: str, kind: str) -> bytes:
    """The key it would have there."""
    made: bytes = getattr(partition_beside(store, name), kind)(member(store, name))
    return made


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_for_what_it_is(store: Store, damage: str) -> None:
    """By its kind and no other, and of the flow it was done to."""
    kind, name, tamper = DAMAGES[damage]
    tamper(store)
    findings = store.audit()
    assert {(finding.damage, finding.flow) for finding in findings} == {(kind, store.flows[name].id if name else None)}
    assert all(finding.sentence and str(kind) in str(finding) for finding in findings)


def test_every_kind_of_damage_is_done() -> None:
    """By the table, or by what was acknowledged."""
    assert {damage for damage, _, _ in DAMAGES.values()} | {Damage.LOST, Damage.MISTOLD} == {*Damage}


def test_an_acknowledged_change_that_is_gone_is_told(store: Store) -> None:
    """One that never was, of another kind, at another revision, of a flow that does not exist."""
    flow = store.flows["finished"]
    told = {
        Acknowledged(flow.id, flow.etag, 2, "finished"): None,
        Acknowledged(flow.id, "0" * 32, 2, "finished"): Damage.LOST,
        Acknowledged(flow.id, "0" * 32, 0): Damage.LOST,
        Acknowledged(flow.id, flow.etag, 2, "cancelled"): Damage.LOST,
        Acknowledged(flow.id, flow.etag, 3, "finished"): Damage.MISTOLD,
        Acknowledged(uuid4(), flow.etag, 2, "finished"): Damage.LOST,
    }
    found = store.audit(*told)
    assert [(finding.damage, finding.flow) for finding in found] == [
        (damage, change.flow_id) for change, damage in told.items() if damage is not None
    ]


def test_what_was_trimmed_away_is_not_missed(store: Store) -> None:
    """A bounded trail need not begin at the beginning, if it is as long as the bound; nor show what it showed then."""
    flow = store.flows["changed"]
    told = [Acknowledged(flow.id, "0" * 32, 1, "started"), Acknowledged(flow.id, flow.etag, flow.revision)]
    for _ in range(3):
        flow = store.manager.update_state(flow, increment={"n": 1})
    store.raw.xtrim(store.key("events", "changed"), maxlen=5, approximate=False)
    assert store.audit(*told, event_maxlen=5) == []
    assert {finding.damage for finding in store.audit(*told)} == {Damage.GAP}
    assert {finding.damage for finding in store.audit(*told, event_maxlen=6)} == {Damage.GAP}
    lost = Acknowledged(flow.id, "0" * 32, flow.revision, "state_updated")
    assert [finding.damage for finding in store.audit(*told, lost, event_maxlen=5)] == [Damage.LOST]
    store.raw.hincrby(store.key("flow", "changed"), "revision", 1)
    assert [finding.damage for finding in store.audit(*told, event_maxlen=5)] == [Damage.REVISION]
