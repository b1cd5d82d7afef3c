"""`durability="all"` confirms just what every replica has, whatever a call that is sent again finds to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import AsyncFlowManager, Flow, FlowManager, FlowNotFound, NotDurable
from redisflow.ops.batches import Queued, carry_out
from redisflow.ops.changes import update_state
from tests.support.lua import EVERY_SCRIPT
from tests.support.proxy import CUT_REPLY, FaultProxy
from tests.support.resends import IDENTITY
from tests.support.sentinels import NAME, Sentinels
from tests.support.servers import QUICK_SYNC, Engine, Server
from tests.support.subjects import NEWEST, Blocking, LoopThread
from tests.support.waiting import wait_until

SHELLS = ("sync", "asyncio")
SOON_S = 0.1  # for replicas that will not say anything
PATIENT_S = 60.0
# How the replica is away, and the command whose reply is lost.
TROUBLES = [("frozen", ""), ("frozen", "EVALSHA"), ("frozen", "WAIT"), ("gone", "EVALSHA")]


@attrs.define(eq=False)
class Pair:
    """A primary and its replica, which can be away."""

    primary: Server
    replica: Server

    @contextmanager
    def without_replica(self, how: str) -> Iterator[None]:
        """Have the replica frozen, or gone, for as long as the block is."""
        if how == "frozen":
            self.replica.pause()
        else:
            self.replica.kill()
            wait_until(lambda: not self.primary.raw.role()[2], description="the primary misses its replica")
        try:
            yield
        finally:
            self.bring_back()

    def bring_back(self) -> None:
        """Have the replica follow again."""
        if self.replica.paused:
            self.replica.resume()
        elif not self.replica.running:
            self.replica.start()
        wait_until(lambda: self.replica.raw.role()[3] == "connected", description="the replica follows again")

    def on_replica(self, flows: Any, flow_id: UUID) -> bool:
        """Tell whether the replica has a flow."""
        return self.replica.client().hexists(key_of(flows, flow_id), "status") == 1


def key_of(flows: Any, flow_id: UUID) -> bytes:
    """Return the key of a flow's hash."""
    key: bytes = flows.namespace.keyspace.partition_of(flow_id).flow(str(flow_id).encode())
    return key


@pytest.fixture(scope="module", params=NEWEST, ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A primary with one replica, on every engine."""
    engine: Engine = request.param
    with Server(engine, *QUICK_SYNC) as primary:
        for script in EVERY_SCRIPT:
            primary.client().script_load(script.source.text.decode())
        with Server(engine, *QUICK_SYNC, "--replicaof", "127.0.0.1", str(primary.port)) as replica:
            pair = Pair(primary, replica)
            pair.bring_back()
            yield pair


@pytest.fixture
def lossy(pair: Pair) -> Iterator[FaultProxy]:
    """A proxy before the primary, which loses nothing so far."""
    with FaultProxy(pair.primary.port) as proxy:
        yield proxy


@pytest.fixture
def direct(pair: Pair, prefix: str) -> Iterator[FlowManager]:
    """A manager that waits for no replica, and reaches the primary without the proxy."""
    with FlowManager.from_url(pair.primary.url, prefix=prefix) as flows:
        yield flows


@pytest.fixture(params=SHELLS)
def sure(request: pytest.FixtureRequest, lossy: FaultProxy, prefix: str, loop_thread: LoopThread) -> Iterator[Any]:
    """A manager whose changes wait for all replicas, of either shell; it has seen the one that there is."""
    options: dict[str, Any] = {"prefix": prefix, "durability": "all", "confirm_within_s": SOON_S}
    flows: Any
    if request.param == "sync":
        flows = FlowManager.from_url(lossy.url, deadline_s=PATIENT_S, **options)
    else:
        flows = Blocking(AsyncFlowManager.from_url(lossy.url, deadline_s=PATIENT_S, **options), loop_thread)
    wait_until(lambda: flows.create_managed(**IDENTITY), description="a change is confirmed", ignoring=(NotDurable,))
    yield flows
    flows.close()


def pay(flows: Any, flow_ids: Sequence[UUID]) -> list[Callable[[], Any]]:
    """Add to flows by a batch. Return what gives each verb's result."""
    if isinstance(flows, FlowManager):
        with flows.batch() as batch:
            return [batch.update_state(flow_id, increment={"paid": 1}).result for flow_id in flow_ids]
    # In asyncio no verb makes a batch of changes; what carries one out is the same.
    options: dict[str, Any] = {"next_step": None, "unset": (), "expected_revision": None, "op_id": None}
    queued = [
        Queued(update_state(flows.namespace, flow_id, None, increment={"paid": 1}, **options)) for flow_id in flow_ids
    ]
    flows.perform(carry_out(queued))
    return [one.result for one in queued]


def running(direct: FlowManager, count: int) -> list[Flow]:
    """Make flows to be changed."""
    return [direct.create_mirrored(**IDENTITY, state={"paid": 0}) for _ in range(count)]


def absent(direct: FlowManager, how: str) -> UUID:
    """Return the id of a flow that does not exist: never did, or does no more."""
    if how == "never there":
        return uuid4()
    (flow,) = running(direct, 1)
    assert direct.delete(flow)
    return flow.id


troubled = pytest.mark.parametrize(("how", "reply"), TROUBLES, ids=lambda word: word or "none")
missing = pytest.mark.parametrize("gap", ["never there", "deleted"])


@troubled
@missing
def test_a_batch_is_not_confirmed_by_a_verb_whose_flow_is_absent(
    pair: Pair, lossy: FaultProxy, direct: FlowManager, sure: Any, *, how: str, reply: str, gap: str
) -> None:
    """The last verb of a packet writes nothing: what the others wrote is waited for all the same."""
    made = running(direct, 3)
    nobody = absent(direct, gap)
    with pair.without_replica(how):
        if reply:
            lossy.inject(CUT_REPLY, reply)
        *results, last = pay(sure, [*[flow.id for flow in made], nobody])
        assert lossy.faults["cut_reply"] == bool(reply)
        for flow, result in zip(made, results, strict=True):
            with pytest.raises(NotDurable) as raised:
                result()
            assert raised.value.flow is not None
            assert raised.value.flow == direct.get(flow)
            assert raised.value.flow.state["paid"] == 1
            assert (raised.value.wanted, raised.value.reached) == (1, 0)
        with pytest.raises(FlowNotFound):
            last()


@pytest.mark.parametrize("reply", ["", "EVALSHA", "WAIT"], ids=lambda word: word or "none")
@missing
def test_a_batch_whose_flows_are_all_absent_says_so(
    pair: Pair, lossy: FaultProxy, direct: FlowManager, sure: Any, *, reply: str, gap: str
) -> None:
    """Nothing was changed and nothing is missing; and no key is left that was not there."""
    nobodies = [absent(direct, gap) for _ in range(3)]
    with pair.without_replica("frozen"):
        if reply:
            lossy.inject(CUT_REPLY, reply)
        for result in pay(sure, nobodies):
            with pytest.raises(FlowNotFound):
                result()
    for nobody in nobodies:
        assert direct.get(nobody) is None
        # What is left, of a flow that was deleted or of an attempt that was settled, is left for a while.
        ttl_s = pair.primary.raw.ttl(key_of(direct, nobody))
        assert ttl_s > 0 or (ttl_s == -2 and gap == "never there")
        if gap == "never there" and not reply:
            assert ttl_s == -2
        assert direct.create_managed(**IDENTITY, flow_id=nobody).revision == 0


@troubled
def test_a_deletion_is_not_confirmed_by_finding_nothing_to_delete(
    pair: Pair, lossy: FaultProxy, direct: FlowManager, sure: Any, *, how: str, reply: str
) -> None:
    """Whatever it finds when it is sent again, the deletion is waited for, and so it is when it is called again."""
    (flow,) = running(direct, 1)
    wait_until(lambda: pair.on_replica(direct, flow.id), description="the replica has the flow")
    with pair.without_replica(how):
        if reply:
            lossy.inject(CUT_REPLY, reply)
        op_id = None
        for ref in (flow, flow, flow.id):
            with pytest.raises(NotDurable) as raised:
                sure.delete(ref, op_id=op_id)
            assert (raised.value.wanted, raised.value.reached) == (1, 0)
            assert op_id in {None, raised.value.op_id}
            op_id = raised.value.op_id
            assert direct.get(flow) is None
        assert lossy.faults["cut_reply"] == bool(reply)
        pair.bring_back()
        confirmed = wait_until(
            lambda: [sure.delete(flow, op_id=op_id)], description="the deletion is confirmed", ignoring=(NotDurable,)
        )
        assert confirmed == [True]
        assert not pair.on_replica(direct, flow.id)


def test_a_deletion_that_finds_no_flow_waits_as_well(pair: Pair, sure: Any) -> None:
    """Another may have deleted it a moment ago, and that may not be confirmed."""
    with pair.without_replica("frozen"), pytest.raises(NotDurable):
        sure.delete(uuid4())
    absence = wait_until(lambda: [sure.delete(uuid4())], description="an absence is confirmed", ignoring=(NotDurable,))
    assert absence == [False]


@pytest.mark.parametrize("engine", NEWEST, ids=str)
@pytest.mark.parametrize("shell", SHELLS)
def test_a_replica_that_sentinels_hear_of_later_is_waited_for(
    engine: Engine, shell: str, loop_thread: LoopThread
) -> None:
    """It joins when the manager is in use already, and loses its primary: it may be promoted, without the change."""
    with Sentinels(engine, replicas=1, sentinels=1) as group, ExitStack() as stack:
        options: dict[str, Any] = {"durability": "all", "confirm_within_s": SOON_S}
        flows: Any
        if shell == "sync":
            flows = FlowManager.from_url(group.url, **options)
        else:
            flows = Blocking(AsyncFlowManager.from_url(group.url, **options), loop_thread)
        stack.callback(flows.close)
        flow = wait_until(
            lambda: flows.create_mirrored(**IDENTITY), description="a change is confirmed", ignoring=(NotDurable,)
        )
        primary, sentinel = group.primary(), group.sentinels[0]
        later = stack.enter_context(Server(engine, "--replicaof", "127.0.0.1", str(primary.port)))
        wait_until(
            lambda: len(sentinel.raw.execute_command("SENTINEL", "REPLICAS", NAME)) == 2,
            description="the Sentinel knows both replicas",
            timeout_s=PATIENT_S,
        )
        later.kill()
        wait_until(lambda: len(primary.raw.role()[2]) == 1, description="the primary misses it")

        def is_missed() -> bool:
            try:
                flows.update_state(flow.id, increment={"n": 1})
            except NotDurable as error:
                return (error.wanted, error.reached) == (2, 1)
            return False

        wait_until(is_missed, description="a change is said to lack a replica", timeout_s=20.0)
