"""Changes that wait for replicas, and what is raised when these do not say that they have them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import attrs
import pytest

from redisflow import (
    AsyncFlowManager,
    Flow,
    InvalidData,
    Manual,
    NotDurable,
    OutcomeUnknown,
    RevisionMismatch,
    StorageError,
)
from redisflow.ops.namespace import op_id_of
from tests.beyond_one_server.conftest import Open
from tests.support.clusters import Cluster
from tests.support.proxy import HANG_REPLY, PASS, Fault, FaultProxy
from tests.support.servers import ENGINES, Engine, Server
from tests.support.subjects import VERBS, WHO, flow_in, observed, source_of
from tests.support.waiting import wait_until

SOON_S = 0.2  # for replicas that will not say anything


@attrs.frozen
class Group:
    """A primary and its replicas."""

    primary: Server
    replicas: list[Server]


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """One of two replicas, on every engine."""
    with ExitStack() as stack:
        yield grouped(stack, request.param)


def grouped(stack: ExitStack, engine: Engine) -> Group:
    """Start a primary and two replicas, and wait until they follow it."""
    primary, *replicas = (stack.enter_context(Server(engine, "--repl-diskless-sync-delay", "0")) for _ in range(3))
    for replica in replicas:
        replica.raw.execute_command("REPLICAOF", "127.0.0.1", primary.port)
    wait_until(
        lambda: sum(primary.raw.info("replication").get(f"slave{n}", {}).get("state") == "online" for n in (0, 1)) == 2,
        description="the replicas follow",
    )
    return Group(primary, list(replicas))


@pytest.fixture
def flows(open_url: Open, group: Group) -> Any:
    """A manager whose changes wait for all replicas."""
    group.primary.client().flushall()
    return open_url(group.primary.url, durability="all", confirm_within_s=5.0)


@pytest.fixture
def short(open_url: Open, group: Group, flows: Any) -> Iterator[Any]:
    """The same, when one of two replicas has fallen silent; it is known of."""
    flows.create_managed(**WHO)
    manager = open_url(group.primary.url, durability="replicas:2", confirm_within_s=SOON_S)
    manager.connect()
    group.replicas[0].pause()
    yield manager
    group.replicas[0].resume()


CHANGES: dict[str, Callable[[Any, Flow], Any]] = VERBS | {
    "create_managed": lambda flows, _: flows.create_managed(**WHO),
    "create_mirrored": lambda flows, _: flows.create_mirrored(**WHO),
    "update_and_append": lambda flows, flow: flows.update_and_append(flow, "sorted"),
    "mutate": lambda flows, flow: flows.mutate(flow, lambda now: now, kind="looked"),
    "append_event": lambda flows, flow: flows.append_event(flow, "note"),
    "record_step_observation": lambda flows, flow: flows.record_step_observation(observed(flow.id)),
    "delete": lambda flows, flow: flows.delete(flow),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_too_few_confirm_is_applied_and_says_so(flows: Any, short: Any, name: str) -> None:
    """With the flow, and how many of how many."""
    flow = flow_in(flows.with_durability("local"), source_of(name) if name in VERBS else "running")
    with pytest.raises(NotDurable) as raised:
        CHANGES[name](short, flow)
    error = raised.value
    assert (error.wanted, error.reached) == (2, 1)
    stored = flows.get(error.flow or flow)
    if error.flow is not None:
        assert error.flow == stored
        assert error.flow.revision >= flow.revision or name.startswith("create")
    else:
        assert name in {"append_event", "record_step_observation", "delete"}
        assert (stored is None) == (name == "delete")


def test_confirmed_changes_are_on_every_replica(flows: Any, group: Group) -> None:
    """When the call returns, and not a moment later."""
    for _ in range(20):
        flow = flows.start_running(flows.create_managed(**WHO))
        key = flows.namespace.keyspace.partition_of(flow.id).flow(str(flow.id).encode())
        assert {replica.client().hget(key, "etag") for replica in group.replicas} == {flow.etag.encode()}


def test_a_refusal_is_raised_as_ever(flows: Any, short: Any) -> None:
    """Nothing was changed, so nothing is missing."""
    flow = flow_in(flows.with_durability("local"), "running")
    with pytest.raises(RevisionMismatch):
        short.update_state(flow, {"x": 1}, expected_revision=7)


def test_a_level_can_be_asked_for_by_call(flows: Any, short: Any) -> None:
    """One of two is enough for `replicas:1`, and none is needed for `local`."""
    flow = short.with_durability("replicas:1").create_mirrored(**WHO)
    flow = short.with_durability("local").update_state(flow, {"x": 1})
    with pytest.raises(NotDurable):
        short.with_durability("replicas:2").finish(flow)
    assert flows.get(flow).status == "finished"


def waits_of(server: Server) -> int:
    """How often a server was told to wait for its replicas."""
    calls: int = server.raw.info("commandstats").get("cmdstat_wait", {"calls": 0})["calls"]
    return calls


def test_a_wait_may_be_longer_than_the_socket_timeout(open_url: Open, flows: Any, group: Group) -> None:
    """It is asked for again: a server that says nothing for so long would be taken for dead."""
    flow = flow_in(flows, "running")
    patient = open_url(
        f"{group.primary.url}?socket_timeout=0.2", durability="replicas:2", deadline_s=60.0, confirm_within_s=60.0
    )
    patient.connect()
    group.replicas[0].pause()
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(patient.update_state, flow, {"x": 1})
            before = waits_of(group.primary)
            wait_until(lambda: waits_of(group.primary) > before + 3, description="it was asked for again")
            assert not waiting.done()
        finally:
            group.replicas[0].resume()
        assert waiting.result(60).revision == flow.revision + 1


def test_a_replay_waits_like_the_first_attempt(short: Any, flows: Any, group: Group) -> None:
    """It writes nothing, and the server would wait for nothing: what it found may not have been confirmed."""
    flow, op_id = flow_in(flows.with_durability("local"), "running"), op_id_of(None)
    for _ in range(2):
        with pytest.raises(NotDurable) as raised:
            short.update_state(flow, {"x": 1}, op_id=op_id)
        assert raised.value.flow == flows.get(flow)
    group.replicas[0].resume()
    after = flows.update_state(flow, {"x": 1}, op_id=op_id)
    assert after.revision == flow.revision + 1
    assert len(list(flows.iter_events(flow))) == 3


def test_a_lost_reply_is_settled_and_confirmed(open_url: Open, flows: Any, group: Group) -> None:
    """Applied once, waited for in the end."""
    flow = flow_in(flows, "running")
    with FaultProxy(group.primary.port) as proxy:
        through = open_url(proxy.url, durability="all", confirm_within_s=5.0)
        through.connect()
        proxy.cut_next_reply()
        assert through.update_state(flow, {"x": 1}).revision == flow.revision + 1
        assert proxy.faults["cut_reply"] == 1


def test_the_wait_is_sent_behind_the_change_without_awaiting_its_reply(open_url: Open, group: Group) -> None:
    """So that it costs no round trip: with the change's reply held up, the wait has been sent."""
    with FaultProxy(group.primary.port) as proxy:
        flows = open_url(f"{proxy.url}?socket_timeout=3", prefix="one-packet", durability="all", deadline_s=1.0)
        flow = flows.create_mirrored(**WHO)
        flows.update_state(flow, {"x": 0})  # the server knows the script
        behind: list[bytes] = []

        def plan(command: list[bytes]) -> Fault:
            if command[0] == b"EVALSHA":
                return HANG_REPLY
            behind.append(command[0])
            return PASS

        proxy.plan = plan
        with pytest.raises(OutcomeUnknown):
            flows.update_state(flow, {"x": 1})
        assert b"WAIT" in behind


def test_each_verb_of_a_batch_says_so(group: Group) -> None:
    """They share one wait, and each has its own flow."""
    from redisflow import FlowManager

    group.primary.client().flushall()
    with FlowManager.from_url(group.primary.url, durability="all", confirm_within_s=SOON_S) as flows:
        made = [flows.create_managed(**WHO) for _ in range(3)]
        group.replicas[0].pause()
        try:
            with flows.batch() as batch:
                queued = [batch.start_running(flow) for flow in made]
            for one, flow in zip(queued, made, strict=True):
                with pytest.raises(NotDurable) as raised:
                    one.result()
                assert raised.value.flow == flows.get(flow)
        finally:
            group.replicas[0].resume()


def test_what_engines_and_pruning_do_is_not_waited_for(short: Any, flows: Any) -> None:
    """The next of them does it again."""
    flow = flows.with_durability("local").request_cancel(flow_in(flows.with_durability("local"), "waiting"))
    from redisflow import FlowManager, WaitEngine

    if isinstance(short, FlowManager):
        assert WaitEngine(short).tick().cancelled == 1
        assert flows.get(flow).status == "cancelled"


def test_all_of_none_is_not_enough(open_url: Open) -> None:
    """Where there are no replicas, `all` promises nothing, and says so."""
    with Server(ENGINES[0]) as server:
        flows = open_url(server.url, durability="all", confirm_within_s=0.05)
        with pytest.raises(NotDurable) as raised:
            flows.create_managed(**WHO)
        assert (raised.value.wanted, raised.value.reached) == (1, 0)


def test_many_at_once_are_each_confirmed(flows: Any, group: Group) -> None:
    """From many threads, or many tasks."""
    if isinstance(getattr(flows, "target", None), AsyncFlowManager):

        async def gathered() -> list[Flow]:
            return list(await asyncio.gather(*(flows.target.create_managed(**WHO) for _ in range(200))))

        made: list[Flow] = flows._thread.run(gathered())
    else:
        with ThreadPoolExecutor(16) as pool:
            made = list(pool.map(lambda _: flows.create_managed(**WHO), range(200)))
    for replica in group.replicas:
        assert sum(replica.client().exists(_key(flows, flow)) for flow in made) == 200


def _key(flows: Any, flow: Flow) -> bytes:
    key: bytes = flows.namespace.keyspace.partition_of(flow.id).flow(str(flow.id).encode())
    return key


@pytest.mark.parametrize("level", ["", "most", "replicas", "replicas:0", "replicas:-1", "replicas:100", "ALL", None, 1])
def test_a_level_that_is_none_is_refused(open_url: Open, level: Any) -> None:
    """When the manager is made, and when a view is."""
    with pytest.raises(InvalidData, match="durability"):
        open_url("memory://", durability=level)
    with pytest.raises(InvalidData, match="durability"):
        open_url("memory://").with_durability(level)


def test_memory_has_no_replicas(open_url: Open) -> None:
    """Nor will it ever."""
    with pytest.raises(InvalidData, match="no replicas"):
        open_url("memory://", durability="all").connect()
    view = open_url("memory://").with_durability("replicas:1")
    with pytest.raises(InvalidData, match="no replicas"):
        view.create_managed(**WHO)


def test_a_user_who_may_not_wait_is_told_at_connect(open_url: Open) -> None:
    """And not by a change that was applied."""
    with Server(ENGINES[0]) as server:
        server.client().acl_setuser("kate", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-wait"])
        url = server.url.replace("redis://", "redis://kate:pw@")
        open_url(url).connect()
        with pytest.raises(StorageError, match="permission"):
            open_url(url, durability="all").connect()


def test_a_cluster_waits_on_the_node_of_the_flow(open_url: Open, cluster: Cluster) -> None:
    """Each change for the replica of its own primary; the others' matter nothing."""
    flows = open_url(cluster.url, prefix="waiting", durability="all", confirm_within_s=SOON_S)
    made = [flows.with_durability("local").create_mirrored(**WHO) for _ in range(40)]
    deaf = cluster.primaries[0]
    (replica,) = cluster.replicas_of(deaf)
    replica.server.pause()
    try:
        heard, unheard = 0, 0
        for flow in made:
            node = cluster.primary_of(flows.namespace.keyspace.partition_of(flow.id).slot)
            if node is not deaf:
                assert flows.set_waiting(flow, Manual()).revision == flow.revision + 1
                heard += 1
            elif unheard < 3:
                with pytest.raises(NotDurable) as raised:
                    flows.set_waiting(flow, Manual())
                assert (raised.value.wanted, raised.value.reached) == (1, 0)
                unheard += 1
        assert min(heard, unheard) >= 2
    finally:
        replica.server.resume()
        cluster.await_healthy()
