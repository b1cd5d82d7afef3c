"""Random operations on real servers, held against the pure model of the rules step by step."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

import attrs
import fakeredis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from redisflow import (
    ExternalEvent,
    Flow,
    FlowError,
    FlowManager,
    FlowStatus,
    FlowStepStatus,
    Manual,
    RevisionMismatch,
    StepObservation,
    StepRuntime,
    Timer,
    WaitEngine,
)
from tests.support.model import Model, ModelEvent, ModelFlow, Refused, exact, incremented, merged
from tests.support.servers import ENGINES, Server

IDS = [UUID(int=n) for n in (0, 1, 16, 2**127 + 5)]
OWNERS = ["agent:kate", "agent:\0{joe}\n"]
KEYS = ["n", "m", "tmp", "", "é{}\0"]
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
FAR_OFF = datetime(2100, 1, 1, tzinfo=UTC)
AGO, OFF = "2001-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"
# What a caller gives, and what must be stored.
WAITS: list[tuple[Any, dict[str, Any]]] = [
    (Timer(at=LONG_AGO), {"kind": "timer", "at": AGO}),
    (Timer(at=FAR_OFF), {"kind": "timer", "at": OFF}),
    (Timer(at=FAR_OFF, deadline=LONG_AGO), {"kind": "timer", "at": OFF, "deadline": AGO}),
    (ExternalEvent("t", "c"), {"kind": "external_event", "topic": "t", "correlation_id": "c"}),
    (
        {"kind": "external_event", "topic": "t", "correlation_id": "c", "deadline": AGO},
        {"kind": "external_event", "topic": "t", "correlation_id": "c", "deadline": AGO},
    ),
    (Manual(), {"kind": "manual"}),
    (Manual(deadline=FAR_OFF), {"kind": "manual", "deadline": OFF}),
    ({"kind": "my own", "at": 7}, {"kind": "my own", "at": 7}),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
mappings = st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
patches = st.one_of(st.none(), mappings, mappings, mappings, values)
deltas = st.one_of(st.integers(-5, 5), st.sampled_from([2**63 - 1, -(2**63), 2**62]))
increments = st.dictionaries(st.sampled_from(KEYS[:3]), deltas, max_size=2)
slots = st.integers(0, len(IDS) - 1)
forms = st.sampled_from(["uuid", "text", "copy", "copy", "evolved", "written into"])
expectations = st.sampled_from([None, None, None, "current", "current", "copy", "wrong"])
ops = st.sampled_from([None, None, "own"])


class Machine(RuleBasedStateMachine):
    """One namespace of a server, and the model of it."""

    connect: ClassVar[Callable[[], FlowManager]]
    raw: ClassVar[Any]  # a client of the same server

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.flows = type(self).connect()
            self.flows.connect()
        self.model = Model()
        self.sound = True
        self.copies: dict[UUID, list[Flow]] = {flow_id: [] for flow_id in IDS}
        self.step_ids: dict[tuple[UUID, str], tuple[Any, Any]] = {}
        self.replayable: list[tuple[Callable[[], Any], Callable[[], Any], UUID]] = []

    # --- pieces ---

    def reference(self, slot: int, form: str) -> tuple[Any, Flow | None]:
        """The flow as an argument, and the copy whose version it carries."""
        flow_id = IDS[slot]
        if form in {"uuid", "text"} or not self.copies[flow_id]:
            return (str(flow_id) if form == "text" else flow_id), None
        held = self.copies[flow_id][-1 if form != "copy" else len(self.copies[flow_id]) // 2]
        if form == "evolved":
            return attrs.evolve(held, state={"evil": 1}, current_step="evil", cancel_requested=True), held
        if form == "written into" and isinstance(held.state, dict):
            self.copies[flow_id].remove(held)
            held.state["evil"] = 1
        return held, held

    def guards(self, slot: int, expect: str | None, held: Flow | None, op: str | None) -> tuple[Any, Any]:
        """The options of a call, and those of the model's."""
        stored = self.model.flows.get(IDS[slot])
        current = 0 if stored is None else stored.revision
        expected = {None: None, "current": current, "wrong": current + 1, "copy": current}[expect]
        if expect == "copy" and held is not None:
            expected = held.revision
        etag = held.etag if held is not None and held.revision == expected else None
        op_id = uuid4().hex if op else None
        options = {"expected_revision": expected, "op_id": op_id}
        return options, {"expected": expected, "expected_etag": etag, "op": op_id}

    def both(self, flow_id: UUID, real: Callable[[], Any], modelled: Callable[[], Any], op: str | None = None) -> Any:
        """Carry a call out on both sides; the answers must agree, and then what is stored."""
        if op:
            self.replayable.append((real, modelled, flow_id))
        self.sound = False
        refusal, error, answer = None, None, None
        try:
            modelled()
        except Refused as refused:
            refusal = refused
        try:
            answer = real()
        except FlowError as refused:
            error = refused
        assert (type(error).__name__ if error else None) == (refusal.name if refusal else None), (
            f"{error!r}, {refusal!r}"
        )
        for name, fact in refusal.facts.items() if refusal else ():
            if not isinstance(error, RevisionMismatch) or name != "expected" or fact is not None:
                assert getattr(error, name) == fact
        self.compare(flow_id, answer)
        return answer

    def compare(self, flow_id: UUID, answer: Any) -> None:
        """Hold one stored flow, and the flow a call returned, against the model."""
        self.sound = False
        self._compare(flow_id, answer)
        self.sound = True

    def _compare(self, flow_id: UUID, answer: Any) -> None:
        stored, modelled = self.flows.get(flow_id), self.model.flows.get(flow_id)
        if modelled is None:
            assert stored is None
            assert self.flows.list_events(flow_id) == []
            return
        assert stored is not None
        if modelled.created_at is None:
            modelled.created_at = stored.created_at
            assert stored.updated_at == stored.created_at
        if stored.etag != modelled.etag:
            assert modelled.updated_at is None or stored.updated_at >= modelled.updated_at
            modelled.etag, modelled.updated_at = stored.etag, stored.updated_at
        assert as_mapping(stored) == as_expected(modelled, stored)
        if isinstance(answer, Flow):
            assert as_mapping(answer) == as_mapping(stored)
            self.copies[flow_id] = [*self.copies[flow_id][-4:], answer]
        (last,) = self.flows.list_events(flow_id, 1)
        assert same_event(last, modelled.events[-1])

    # --- rules ---

    @initialize(status=st.sampled_from(["managed", "mirrored"]))
    def begin(self, status: str) -> None:
        self.create(slot=0, mirrored=status == "mirrored", owner=OWNERS[0], state={"n": 1}, exist_ok=False, op=None)

    @rule(
        slot=slots, mirrored=st.booleans(), owner=st.sampled_from(OWNERS), state=patches, exist_ok=st.booleans(), op=ops
    )
    def create(self, *, slot: int, mirrored: bool, owner: str, state: Any, exist_ok: bool, op: str | None) -> None:
        flow_id = IDS[slot]
        identity = {"controller_id": "c", "goal": "g", "owner_session_key": owner, "requester_origin": "r"}
        method = self.flows.create_mirrored if mirrored else self.flows.create_managed
        op_id = uuid4().hex if op else None
        self.both(
            flow_id,
            lambda: method(**identity, state=state, flow_id=flow_id, exist_ok=exist_ok, op_id=op_id),
            lambda: self.model.create(
                flow_id, identity, copy.deepcopy(state), mirrored=mirrored, exist_ok=exist_ok, op=op_id
            ),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        verb=st.sampled_from(["start", "start", "cancel", "request_cancel"]),
    )
    def plain_verb(self, *, slot: int, form: str, expect: str | None, op: str | None, verb: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        method = {"start": "start_running"}.get(verb, verb)

        def flag(flow: ModelFlow) -> None:
            flow.cancel_requested = True

        changes: dict[str, Callable[[], Any]] = {
            "start": lambda: self.model.change(IDS[slot], "started", {}, target="running", **guards),
            "cancel": lambda: self.model.change(
                IDS[slot], "cancelled", {}, target="cancelled", pending="allow", **guards
            ),
            "request_cancel": lambda: self.model.change(
                IDS[slot], "cancel_requested", {}, flag, pending="ignore", terminal="ignore", **guards
            ),
        }
        self.both(IDS[slot], lambda: getattr(self.flows, method)(ref, **options), changes[verb], op)

    @rule(slot=slots, form=forms, expect=expectations, op=ops, wait=st.sampled_from(WAITS))
    def set_waiting(
        self, *, slot: int, form: str, expect: str | None, op: str | None, wait: tuple[Any, dict[str, Any]]
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        given, wire = wait

        def edit(flow: ModelFlow) -> None:
            flow.wait = dict(wire)

        self.both(
            IDS[slot],
            lambda: self.flows.set_waiting(ref, given, **options),
            lambda: self.model.change(IDS[slot], "waiting", {"wait": wire}, edit, target="waiting", **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        patch=patches,
        verb=st.sampled_from(["resume", "resume", "finish"]),
    )
    def merging_verb(self, *, slot: int, form: str, expect: str | None, op: str | None, patch: Any, verb: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        kind, name, target = {
            "resume": ("resumed", "state_patch", "running"),
            "finish": ("finished", "final_state", "finished"),
        }[verb]

        def edit(flow: ModelFlow) -> None:
            flow.state = flow.state if patch is None else merged(flow.state, patch)

        self.both(
            IDS[slot],
            lambda: getattr(self.flows, verb)(ref, patch, **options),
            lambda: self.model.change(IDS[slot], kind, {name: patch}, edit, target=target, **guards),
            op,
        )

    @rule(slot=slots, form=forms, expect=expectations, op=ops, reason=st.text(max_size=40))
    def fail(self, *, slot: int, form: str, expect: str | None, op: str | None, reason: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)

        def edit(flow: ModelFlow) -> None:
            flow.state = merged(flow.state, {"failure": {"reason": reason, "at": NOW}})

        self.both(
            IDS[slot],
            lambda: self.flows.fail(ref, reason, **options),
            lambda: self.model.change(IDS[slot], "failed", {"reason": reason}, edit, target="failed", **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        patch=patches,
        next_step=st.sampled_from([None, "s1", "s2"]),
        increment=increments,
        unset=st.lists(st.sampled_from([*KEYS, "absent"]), max_size=2),
    )
    def update_state(
        self,
        *,
        slot: int,
        form: str,
        expect: str | None,
        op: str | None,
        patch: Any,
        next_step: Any,
        increment: Any,
        unset: Any,
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)

        def edit(flow: ModelFlow) -> None:
            summed = incremented(flow.state, increment) if increment else flow.state
            if unset and not isinstance(summed, dict):
                raise Refused("InvalidData")
            state = summed if patch is None else merged(summed, patch)
            flow.state = {k: v for k, v in state.items() if k not in unset} if isinstance(state, dict) else state
            flow.current_step = next_step or flow.current_step

        def modelled() -> None:
            named = [*unset, *increment, *(patch if isinstance(patch, dict) else ())]
            replaced = patch is not None and not isinstance(patch, dict)
            if len(set(named)) < len(named) or (replaced and (increment or unset)):
                raise Refused("InvalidData")  # there is no order in which two would be right
            payload = {"patch": patch, "next_step": next_step}
            payload |= {"increment": increment} if increment else {}
            payload |= {"unset": unset} if unset else {}
            self.model.change(IDS[slot], "state_updated", payload, edit, **guards)

        self.both(
            IDS[slot],
            lambda: self.flows.update_state(
                ref, patch, next_step=next_step, increment=increment, unset=unset, **options
            ),
            modelled,
            op,
        )

    @rule(
        slot=slots,
        which=st.integers(0, 4),
        state=st.one_of(st.just("same"), mappings, mappings, values),
        status=st.sampled_from(["same", "same", *FlowStatus]),
        wait=st.sampled_from([None, *WAITS]),
        flag=st.sampled_from([None, None, None, True, False]),
        step=st.sampled_from(["s1", "s2"]),
        op=ops,
        through=st.sampled_from(["update_and_append", "mutate"]),
    )
    def rewrite(
        self,
        *,
        slot: int,
        which: int,
        state: Any,
        status: Any,
        wait: Any,
        flag: Any,
        step: str,
        op: str | None,
        through: str,
    ) -> None:
        flow_id = IDS[slot]
        if not self.copies[flow_id]:
            return
        held = self.copies[flow_id][which % len(self.copies[flow_id])]
        op_id = uuid4().hex if op else None

        def evolved(flow: Flow) -> Flow:
            new: dict[str, Any] = {"current_step": step}
            new |= {} if state == "same" else {"state": state}
            new |= {} if status == "same" else {"status": status}
            new |= {} if wait is None else {"wait": wait[1]}
            new |= {} if flag is None else {"cancel_requested": flag}
            return attrs.evolve(flow, **new)

        def modelled() -> None:
            if through == "mutate":
                stored = self.model.flows.get(flow_id)
                if stored is None:
                    raise Refused("FlowNotFound", flow_id=flow_id)
                base: Any = copy.deepcopy(stored)
            else:
                base = held
            target = str(base.status if status == "same" else status)
            new_wait = base.wait if wait is None else wait[1]
            if target == "waiting" and new_wait is None:
                raise Refused("InvalidData")

            def edit(flow: ModelFlow) -> None:
                flow.current_step = step
                flow.state = copy.deepcopy(base.state if state == "same" else state)
                flow.wait = dict(new_wait) if target == "waiting" else None
                flow.cancel_requested |= bool(base.cancel_requested if flag is None else flag)

            self.model.change(
                flow_id,
                "rewritten",
                {"by": step},
                edit,
                target=target,
                may_stay=True,
                pending="allow" if target == "cancelled" else "refuse",
                expected=base.revision,
                expected_etag=base.etag,
                op=op_id,
            )

        def real() -> Any:
            if through == "mutate":
                return self.flows.mutate(flow_id, evolved, kind="rewritten", payload={"by": step}, op_id=op_id)
            updated, event = self.flows.update_and_append(evolved(held), "rewritten", {"by": step}, op_id=op_id)
            assert same_event(event, ModelEvent(event.revision, "rewritten", {"by": step}))
            assert event.id in {stored.id for stored in self.flows.list_events(flow_id)}
            return updated

        self.both(flow_id, real, modelled, op)

    @rule(slot=slots, form=forms, expect=expectations, op=ops, payload=mappings)
    def append_event(self, *, slot: int, form: str, expect: str | None, op: str | None, payload: Any) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        self.both(
            IDS[slot],
            lambda: self.flows.append_event(ref, "note", payload, **options),
            lambda: self.model.append_event(IDS[slot], "note", payload, **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        run_id=st.sampled_from(["r1", "r2\0é"]),
        child=st.sampled_from([None, "child", "c" * 40, "c" * 300]),
        status=st.sampled_from([*FlowStepStatus]),
        runtime=st.sampled_from([*StepRuntime]),
        result=values,
    )
    def observe(
        self,
        *,
        slot: int,
        form: str,
        expect: str | None,
        op: str | None,
        run_id: str,
        child: Any,
        status: Any,
        runtime: Any,
        result: Any,
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        seen = StepObservation(ref, run_id, "task", status, child, result)
        step = {"run_id": run_id, "task": "task", "status": status, "child_session_key": child, "result": result}
        answer = self.both(
            IDS[slot],
            lambda: self.flows.record_step_observation(seen, runtime=runtime, **options),
            lambda: self.model.observe(IDS[slot], {**step, "runtime": runtime}, **guards),
            op,
        )
        if answer is not None:
            self.compare_step(IDS[slot], answer)
            assert self.flows.find_step_by_run_id(IDS[slot], run_id) == answer

    def compare_step(self, flow_id: UUID, step: Any) -> None:
        for name, value in self.model.flows[flow_id].steps[step.run_id].items():
            assert exact(getattr(step, name)) == exact(value)
        born = self.step_ids.setdefault((flow_id, step.run_id), (step.id, step.created_at))
        assert (step.id, step.created_at) == born

    @rule()
    def replay(self) -> None:
        """Send the latest call with an op id of the caller's once more."""
        if self.replayable:
            real, modelled, flow_id = self.replayable[-1]
            self.both(flow_id, real, modelled)

    @rule(slot=slots, form=forms, expect=expectations)
    def delete(self, *, slot: int, form: str, expect: str | None) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, None)
        del guards["op"], options["op_id"]
        existed = IDS[slot] in self.model.flows
        self.both(IDS[slot], lambda: self.flows.delete(ref, **options), lambda: self.model.delete(IDS[slot], **guards))
        if existed and IDS[slot] not in self.model.flows:
            # Nothing is left that could tell a replay from a new call.
            self.replayable = [entry for entry in self.replayable if entry[2] != IDS[slot]]
            for key in [key for key in self.step_ids if key[0] == IDS[slot]]:
                del self.step_ids[key]

    @rule()
    def tick(self) -> None:
        due = self.model.due(datetime.now(UTC))
        report = WaitEngine(self.flows).tick()
        for flow_id, why in due.items():
            wait = copy.deepcopy(self.model.flows[flow_id].wait)
            if why == "cancel":
                self.model.change(flow_id, "cancelled", {}, target="cancelled", pending="allow")
            else:
                patch = {"wait_timed_out": wait} if why == "deadline" else None

                def edit(flow: ModelFlow, patch: Any = patch) -> None:
                    flow.state = flow.state if patch is None else merged(flow.state, patch)

                self.model.change(flow_id, "resumed", {"state_patch": patch}, edit, target="running")
            self.compare(flow_id, None)
        cancelled = list(due.values()).count("cancel")
        waiting = sum(flow.status == "waiting" for flow in self.model.flows.values())
        assert (report.resumed, report.cancelled) == (len(due) - cancelled, cancelled)
        assert (report.still_waiting, report.errors) == (waiting, 0)

    @rule(slot=slots, topic=st.sampled_from(["t", "t", "other"]), payload=values)
    def external_event(self, *, slot: int, topic: str, payload: Any) -> None:
        flow = self.model.flows.get(IDS[slot])
        wait = flow.wait if flow is not None and flow.status == "waiting" and not flow.cancel_requested else None
        answer = WaitEngine(self.flows).try_resume_external(IDS[slot], topic, "c", payload)
        if wait is not None and wait["kind"] == "external_event" and wait["topic"] == topic:
            patch = None if payload is None else {"resume_event": payload}

            def edit(flow: ModelFlow) -> None:
                flow.state = flow.state if patch is None else merged(flow.state, patch)

            self.model.change(IDS[slot], "resumed", {"state_patch": patch}, edit, target="running")
            assert answer is not None
        else:
            assert answer is None
        self.compare(IDS[slot], answer)

    @rule(
        owner=st.sampled_from(OWNERS),
        status=st.sampled_from([*FlowStatus]),
        limit=st.sampled_from([None, 0, 1, 2, -1]),
        page=st.integers(1, 3),
    )
    def listings(self, *, owner: str, status: FlowStatus, limit: int | None, page: int) -> None:
        kept = list(self.model.flows.values())
        owned = [flow for flow in kept if flow.identity["owner_session_key"] == owner]
        newest_first = [flow.id for flow in sorted(owned, key=lambda flow: flow.created_at or LONG_AGO, reverse=True)]
        in_status = sorted(
            (flow for flow in kept if flow.status == status), key=lambda flow: flow.updated_at or LONG_AGO
        )
        oldest_first = [flow.id for flow in in_status]
        cut = slice(None if limit is None else max(limit, 0))
        assert [flow.id for flow in self.flows.list_by_owner(owner, limit=limit)] == newest_first[cut]
        assert [flow.id for flow in self.flows.list_by_status(status, limit=limit)] == oldest_first[cut]
        assert [flow.id for flow in self.flows.iter_by_owner(owner, page=page)] == newest_first
        assert [flow.id for flow in self.flows.iter_by_status(status, page=page)] == oldest_first
        for n, flow in enumerate(in_status):
            quiet = self.flows.list_by_status(status, updated_before=flow.updated_at)
            assert [found.id for found in quiet] == oldest_first[:n]
        counts = self.flows.count_by_status()
        assert counts == {s: sum(flow.status == s for flow in kept) for s in FlowStatus}
        assert [flow and flow.id for flow in self.flows.get_many(IDS)] == [
            flow_id if flow_id in self.model.flows else None for flow_id in IDS
        ]

    def teardown(self) -> None:
        """The trails are without gaps; the indexes hold just what the hashes say."""
        try:
            if not self.sound:
                return  # a step has failed: that says more
            for flow_id, modelled in self.model.flows.items():
                self.compare(flow_id, None)
                trail = list(self.flows.iter_events(flow_id))
                assert len(trail) == len(modelled.events)
                assert all(same_event(*pair) for pair in zip(trail, modelled.events, strict=True))
                made = [event.revision for event in trail if event.kind not in {"note", "step_observed"}]
                assert made == list(range(modelled.revision + 1))
                assert Counter(step.run_id for step in self.flows.list_steps(flow_id)) == Counter(list(modelled.steps))
                for step in self.flows.list_steps(flow_id):
                    self.compare_step(flow_id, step)
            assert self.keys() == self.expected_keys()
        finally:
            self.flows.close()

    def keys(self) -> dict[str, set[bytes]]:
        """Every key of the namespace but its meta, with the members of the sets, by kind and name."""
        found: dict[str, set[bytes]] = {}
        for key in self.raw.scan_iter(match=f"{{{self.flows._settings.prefix}:*", count=1000):
            name = key.decode().partition("}:")[2]
            members = set(self.raw.zrange(key, 0, -1)) if self.raw.type(key) == b"zset" else set[bytes]()
            found.setdefault(name, set()).update(members)
        return found

    def expected_keys(self) -> dict[str, set[bytes]]:
        expected: dict[str, set[bytes]] = {}
        for flow in self.model.flows.values():
            name = str(flow.id).encode()
            expected[f"flow:{flow.id}"] = expected[f"events:{flow.id}"] = set()
            if flow.steps:
                expected[f"steps:{flow.id}"] = set()
            expected.setdefault(f"owner:{flow.identity['owner_session_key']}", set()).add(name)
            expected.setdefault(f"status:{flow.status}", set()).add(name)
            if flow.status != "waiting" or flow.wait is None:
                continue
            known = flow.wait["kind"] in {"timer", "external_event", "manual"}
            if flow.cancel_requested or (known and flow.wait.keys() & {"at", "deadline"}):
                expected.setdefault("due", set()).add(name)
            if flow.wait["kind"] == "external_event":
                expected.setdefault("waiters", set()).add(b"t\0c\0" + name)
        return expected


NOW = "the server's time"


def as_mapping(flow: Flow) -> Any:
    """A flow's values, in the exact form."""
    return exact({field.name: getattr(flow, field.name) for field in attrs.fields(Flow) if field.name != "_base"})


def as_expected(modelled: ModelFlow, stored: Flow) -> Any:
    """What a stored flow must look like, in the exact form."""
    state = modelled.state
    if isinstance(state, dict) and isinstance(state.get("failure"), dict) and state["failure"].get("at") == NOW:
        at = stored.updated_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        state = {**state, "failure": {**state["failure"], "at": at}}
    return exact(
        {
            **modelled.identity,
            "id": modelled.id,
            "current_step": modelled.current_step,
            "state": state,
            "wait": modelled.wait,
            "status": FlowStatus(modelled.status),
            "cancel_requested": modelled.cancel_requested,
            "revision": modelled.revision,
            "etag": modelled.etag,
            "created_at": modelled.created_at,
            "updated_at": modelled.updated_at,
        }
    )


def same_event(event: Any, modelled: ModelEvent) -> bool:
    """Whether an event says what it must."""
    wanted = (modelled.revision, modelled.kind, exact(modelled.payload))
    return (event.revision, event.kind, exact(event.payload)) == wanted


def hold_against_the_model(raw: Any, connect: Callable[[str], FlowManager], examples: int) -> None:
    """Run the machine on one server."""

    class OnThisServer(Machine):
        pass

    OnThisServer.connect = staticmethod(lambda: connect(f"m{uuid4().hex}"))
    OnThisServer.raw = raw

    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize="CI" in os.environ,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # Phase.explain traces: slow
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(params=ENGINES, ids=str)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each engine."""
    with Server(request.param) as server:
        yield server


def test_random_operations_on_a_server_agree_with_the_model(server: Server) -> None:
    """What a call answers, what is stored, and what is refused is what the rules say."""
    examples = 60 if server.engine is ENGINES[0] else 15
    hold_against_the_model(
        server.client(),
        lambda prefix: FlowManager.from_url(server.url, prefix=prefix, partitions=3),
        int(os.environ.get("MODEL_EXAMPLES", examples)),
    )


def test_random_operations_on_fakeredis_agree_with_the_model() -> None:
    """The in-memory backend keeps the same rules."""
    client = fakeredis.FakeRedis()
    hold_against_the_model(client, lambda prefix: FlowManager(client, prefix=prefix, partitions=3), 5)
