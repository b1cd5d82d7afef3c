"""How a search finds what lost attempts did, where it ends, and scripts the server has forgotten."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import attrs
import fakeredis
import pytest

from redisflow import Flow, FlowManager, FlowStatus, OutcomeUnknown, StepObservation, Timer, WaitEngine
from redisflow.calls import Call, Command
from redisflow.keys import Partition
from redisflow.scripts import UNTRIMMED
from redisflow.settling import FIRST_PAGE, PAGE, Doubt, Verdict, settle
from tests.support.proxy import CUT_REPLY, PASS, Fault, FaultProxy, Plan
from tests.support.resends import IDENTITY, VERBS, Verb, prepared, sent, settles
from tests.support.servers import ENGINES, Server

OP, OTHER = "ab" * 16, "cd" * 16
ASIDE = "0" * 32
HOUR_S = 3600
MOST_BYTES = 262_144  # of payloads, looked at by one script; it stops after the next 100 entries
PIECE = 100


@attrs.frozen
class Backend:
    """A server, or fakeredis, to which a script can be sent by hand."""

    raw: Any
    real: bool


@pytest.fixture(scope="module", params=[*ENGINES, None], ids=lambda engine: str(engine or "fakeredis"))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every engine, and fakeredis."""
    if request.param is None:
        yield Backend(fakeredis.FakeRedis(), real=False)
        return
    with Server(request.param) as server:
        yield Backend(server.client(), real=True)


# Adds ARGV[1] entries to a stream; ARGV[2] is the payload, then places from 1 and operation ids.
_WRITE = """
local ops = {}
for i = 3, #ARGV, 2 do ops[ARGV[i]] = ARGV[i + 1] end
local ids = {}
for i = 1, tonumber(ARGV[1]) do
  local op = ops[tostring(i)] or string.rep('0', 32)
  ids[i] = redis.call('XADD', KEYS[1], '*', 'rev', 0, 'kind', 'note', 'op', op, 'payload', ARGV[2])
end
return ids
"""


@attrs.frozen
class Trail:
    """A flow with a trail written by hand, and a way to settle what is in doubt on it.

    Attributes:
        pages: of the last search: where each began, and how many entries it was to look at.
    """

    backend: Backend
    flows: FlowManager
    flow_id: UUID
    partition: Partition
    pages: list[tuple[bytes, int]] = attrs.field(factory=list)

    @classmethod
    def of(cls, backend: Backend, prefix: str, **identity: Any) -> Trail:
        """Create a flow; its trail has one event."""
        flows = FlowManager(backend.raw, prefix=prefix)
        flow = flows.create_managed(**IDENTITY | identity)
        return cls(backend, flows, flow.id, flows.namespace.keyspace.partition_of(flow.id))

    @property
    def member(self) -> bytes:
        """The id, as keys have it."""
        return str(self.flow_id).encode()

    @property
    def key(self) -> bytes:
        """The trail's."""
        return self.partition.events(self.member)

    @property
    def hash(self) -> dict[bytes, bytes]:
        """The flow as it is stored."""
        stored: dict[bytes, bytes] = self.backend.raw.hgetall(self.partition.flow(self.member))
        return stored

    @property
    def fence(self) -> bytes:
        """The flow's."""
        return self.hash.get(b"etag", b"")[33:]

    def write(self, count: int, ops: Mapping[int, str] | None = None, *, payload: bytes = b"\x80") -> list[bytes]:
        """Add so many entries; `ops` names the operations of some, counted from the newest, which is 1. Return ids."""
        places = [part for back, op in (ops or {}).items() for part in (count + 1 - back, op)]
        ids: list[bytes] = self.backend.raw.eval(_WRITE, 1, self.key, count, payload, *places)
        return ids

    def trim(self, kept: int) -> None:
        """Leave just the last entries."""
        self.backend.raw.xtrim(self.key, maxlen=kept, approximate=False)

    def doubt(self, op: str = OP, carried: bytes | None = b"", **options: Any) -> Doubt:
        """An attempt to append an event, which was lost."""
        keys = (self.partition.flow(self.member), self.key)
        call = Call(UNTRIMMED.append_event, self.partition.slot, keys, (), self.flow_id, op, **options)
        return Doubt(call, carried)

    def settle(self, *doubts: Doubt) -> list[Verdict]:
        """Settle."""
        self.pages.clear()
        steps = settle(self._ask, doubts)
        with pytest.raises(StopIteration) as stop:
            next(steps)
        verdicts = stop.value.value
        return [verdicts[doubt] for doubt in doubts]

    def search(self, **options: Any) -> Verdict:
        """Settle one attempt."""
        (verdict,) = self.settle(self.doubt(**options))
        return verdict

    def _ask(self, commands: Sequence[Command]) -> Generator[None, None, list[Any]]:
        replies = []
        for command in commands:
            assert command.script is not None
            source = command.script.source if self.backend.real else command.script.plain
            n_keys = int(command.args[2])
            _, _, upper, count, *_ = command.args[3 + n_keys :]
            before = self.entries
            replies.append(self.backend.raw.eval(source.text, n_keys, *command.args[3:]))
            assert self.entries == before  # whatever is found, nothing is added or removed
            self.pages.append((upper, int(count)))
        yield from ()
        return replies

    @property
    def entries(self) -> int:
        """The length of the trail."""
        length: int = self.backend.raw.xlen(self.key)
        return length


@pytest.fixture
def trail(backend: Backend, prefix: str) -> Trail:
    """A flow whose trail the test writes."""
    return Trail.of(backend, prefix)


def pages_to(back: int) -> int:
    """Return how many pages reach an entry, counted from the newest, which is 1."""
    return 1 if back <= FIRST_PAGE else 1 + -(-(back - FIRST_PAGE) // PAGE)


DEPTHS = [1, 2, 99, 100, 101, 1_099, 1_100, 1_101, 2_100, 2_101]


# --- what a search finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", DEPTHS)
def test_an_operation_is_found_wherever_it_is(trail: Trail, back: int) -> None:
    """By the event it left; no page more than must be is read: 100 entries, then 1,000 at a time."""
    ids = trail.write(2_500, {back: OP})
    assert trail.search() == Verdict(b"1-" + ids[-1], ids[-back])
    assert [count for _, count in trail.pages] == [FIRST_PAGE, *[PAGE] * (pages_to(back) - 1)]
    ends = [FIRST_PAGE + PAGE * n for n in range(len(trail.pages) - 1)]
    assert [upper for upper, _ in trail.pages] == [b"+", *[b"(" + ids[-end] for end in ends]]


@pytest.mark.parametrize("count", [0, 1, *DEPTHS, 5_000])
@pytest.mark.parametrize("carried", [b"", None], ids=["ours", "somebody-else's"])
def test_a_whole_trail_tells_that_an_operation_was_not_applied(trail: Trail, count: int, carried: bytes | None) -> None:
    """It has every event there ever was: the attempt was not applied, and no longer can be but with the new fence."""
    trail.write(count)
    (newest, _), *_ = trail.backend.raw.xrevrange(trail.key, count=1)
    assert trail.search(carried=carried, doubtful=carried is None) == Verdict(b"1-" + newest)
    assert trail.fence == b"1-" + newest  # one more, however many pages there were
    assert len(trail.pages) == pages_to(count + 2)  # a page that is not full is the last


@pytest.mark.parametrize("kept", [0, 1, 99, 100, 101, 1_100, 2_000])
def test_a_trimmed_trail_tells_nothing_of_what_it_has_not(trail: Trail, kept: int) -> None:
    """Nobody can say whether the operation was applied; what is there is found."""
    ids = trail.write(3_000, {1_500: OP})
    trail.trim(kept)
    verdict = trail.search()
    if kept >= 1_500:
        assert verdict.event_id == ids[-1_500]
    else:
        assert "trail" in verdict.unknown
        assert verdict.event_id == b""
        assert len(trail.pages) == pages_to(kept + 1)


def test_a_trail_with_a_hole_is_not_whole(trail: Trail) -> None:
    """Somebody has removed an entry in its midst, which may have been the operation's."""
    ids = trail.write(10, {5: OP})
    trail.backend.raw.xdel(trail.key, ids[-5])
    assert trail.search().unknown


def test_the_newest_event_of_an_operation_is_found(trail: Trail) -> None:
    """It was applied twice: to what a failover lost, and to what it kept."""
    ids = trail.write(300, {5: OP, 50: OP, 250: OP})
    assert trail.search().event_id == ids[-5]


def test_the_last_change_of_a_flow_is_found_without_its_event(trail: Trail) -> None:
    """The flow's own etag tells."""
    flow = trail.flows.start_running(trail.flow_id)
    trail.write(10)
    trail.trim(5)
    assert trail.search(op=flow.etag).event_id == b"0-0"
    assert trail.search().unknown


def test_a_creation_is_found_without_its_event(trail: Trail) -> None:
    """A manager that trims trails notes it in the flow; another finds it while the trail is whole."""
    with_note = FlowManager(trail.backend.raw, prefix=trail.flows.namespace.prefix, event_maxlen=100)
    for flows, expected in ((with_note, b"0-0"), (trail.flows, b"")):
        other = Trail.of(trail.backend, trail.flows.namespace.prefix)
        created = flows.create_managed(**IDENTITY)
        other = attrs.evolve(other, flow_id=created.id, partition=flows.namespace.keyspace.partition_of(created.id))
        first = other.backend.raw.xrange(other.key)[0][0]
        if flows is trail.flows:
            assert other.search(op=created.etag, if_deleted=None).event_id == first
        flows.start_running(created)
        other.write(10)
        other.trim(5)
        verdict = other.search(op=created.etag, if_deleted=None)
        assert verdict.event_id == expected
        assert bool(verdict.unknown) is not bool(expected)


# --- ids that callers bring ----------------------------------------------------------------------------------------


def test_a_brought_id_is_looked_up_in_its_index(trail: Trail) -> None:
    """However deep its event is, by one script that reads no trail; a refusal is no application."""
    seen = trail.partition.seen(trail.member)
    applied = trail.flows.append_event(trail.flow_id, "note", op_id=OP)
    trail.write(2_500)
    trail.trim(1_000)
    trail.backend.raw.zadd(seen, {OTHER: -1_700_000_000_000})
    first, second, third = trail.settle(
        *(trail.doubt(op, brought=True, seen=seen) for op in (OP, OTHER, "ef" * 16)),
    )
    assert first.event_id == applied.id.partition("-")[0].encode()
    assert [(one.event_id, one.unknown) for one in (second, third)] == [(b"", "")] * 2
    assert len(trail.pages) == 1


def test_an_id_that_somebody_else_drew_is_looked_for_in_both(trail: Trail) -> None:
    """The index has it if another process has settled it before; else the trail may."""
    seen = trail.partition.seen(trail.member)
    ids = trail.write(500, {400: OP})
    brought = {"brought": True, "seen": seen, "doubtful": True, "carried": None}
    assert trail.search(**brought).event_id == ids[-400]
    trail.backend.raw.zadd(seen, {OP: 1_700_000_000_000})
    assert trail.search(**brought).event_id == b"1700000000000"
    assert trail.search(op=OTHER, **brought) == Verdict(trail.fence)


# --- where a search ends -------------------------------------------------------------------------------------------


def copy_of(event_id: bytes, op: str = OTHER, *, later_us: int = 7) -> dict[bytes, bytes]:
    """A copy of the flow that this event made."""
    milliseconds = int(event_id.partition(b"-")[0])
    return {b"etag": op.encode(), b"updated_at": b"%d" % (1000 * milliseconds + later_us)}


@pytest.mark.parametrize("back", DEPTHS)
def test_a_search_ends_at_the_event_that_made_the_callers_copy(trail: Trail, back: int) -> None:
    """What the call did comes behind it: the trail need not be whole."""
    ids = trail.write(2_500, {back: OTHER})
    trail.trim(2_400)
    assert trail.search(copy=copy_of(ids[-back])) == Verdict(b"1-" + ids[-1])
    assert len(trail.pages) == pages_to(back)


def test_an_event_of_another_time_did_not_make_the_callers_copy(trail: Trail) -> None:
    """The operation was applied twice, to what a failover lost and to what it kept.

    A millisecond is no difference: a server may read its clock once for the change and once for the event.
    """
    ids = trail.write(500, {50: OTHER})
    trail.trim(400)
    copy = copy_of(ids[-50])
    copy[b"updated_at"] = b"%d" % (int(copy[b"updated_at"]) - 1_000)
    assert not trail.search(copy=copy).unknown
    copy[b"updated_at"] = b"%d" % (int(copy[b"updated_at"]) - 1_000)
    assert trail.search(copy=copy).unknown
    for updated_at in (b"", b"x"):
        assert trail.search(copy={**copy, b"updated_at": updated_at}).unknown


def test_the_copy_of_another_call_ends_no_search(trail: Trail) -> None:
    """It is newer than what somebody else did before, perhaps."""
    ids = trail.write(500, {50: OTHER, 400: OP})
    copy = copy_of(ids[-50])
    assert trail.search(copy=copy).event_id == b""
    assert trail.search(copy=copy, carried=None, brought=True, doubtful=True).event_id == ids[-400]


@pytest.mark.parametrize("back", DEPTHS)
def test_a_search_ends_at_the_floor_of_the_fence_that_the_attempt_knew(trail: Trail, back: int) -> None:
    """The attempt was sent after that event: the trail need not be whole."""
    ids = trail.write(2_500)
    trail.trim(2_400)
    floor = ids[-back]
    assert trail.search(carried=b"3-" + floor) == Verdict(b"")
    assert len(trail.pages) == pages_to(back)
    assert trail.search(carried=b"3-0-0").unknown


def test_the_floor_of_a_fence_is_its_flows_last_event(trail: Trail) -> None:
    """An attempt that knows the fence is searched for among what came later."""
    trail.write(300)
    fence = trail.search().fence
    ids = trail.write(50, {20: OP})
    trail.trim(100)
    assert trail.search(carried=fence).event_id == ids[-20]
    assert trail.search(op=OTHER, carried=fence) == Verdict(trail.fence)
    assert len(trail.pages) == 1
    assert trail.fence == b"2-" + ids[-1]
    assert trail.search(op=OTHER, carried=b"").unknown


@pytest.mark.parametrize("carried", [b"", b"7-1-1", b"2-2-2"])
def test_a_fence_is_left_alone_if_the_attempt_knew_another(trail: Trail, carried: bytes) -> None:
    """It cannot be applied as it is."""
    for _ in range(8):
        trail.search(carried=trail.fence)
    fence = trail.fence
    assert fence.startswith(b"8-")
    assert trail.search(carried=carried).fence == fence == trail.fence
    assert trail.search(carried=None).fence == trail.fence != fence


@pytest.mark.parametrize("size", [100, 1_000, 5_000, 100_000])
def test_a_page_is_bounded_in_bytes(trail: Trail, size: int) -> None:
    """A script looks at 100 entries, and goes on until there are 256 KB: no page takes a server long."""
    count = 2_000 if size < 100_000 else 500
    ids = trail.write(count, {count: OP}, payload=b"x" * size)
    assert trail.search().event_id == ids[0]
    ends = [ids.index(upper[1:]) for upper, _ in trail.pages[1:]]
    looked_at = [start - end for start, end in zip([len(ids), *ends], ends, strict=False)]
    per_page = min(PAGE, PIECE * -(-MOST_BYTES // (PIECE * size)))
    assert looked_at == [FIRST_PAGE, *[per_page] * (len(looked_at) - 1)]
    assert len(trail.pages) == 1 + -(-(count - FIRST_PAGE) // per_page)


def test_25_000_events_are_searched_1_000_at_a_time(backend: Backend, trail: Trail) -> None:
    """However deep the event is, it is found, and no script is long."""
    times = 5 if backend.real else 1  # fakeredis takes a minute to write them
    ids = trail.write(5_000, {5_000: OP}) + [event_id for _ in range(times - 1) for event_id in trail.write(5_000)]
    assert trail.search().event_id == ids[0]
    assert len(trail.pages) == pages_to(5_000 * times)
    assert max(count for _, count in trail.pages) == PAGE


# --- several at a time ---------------------------------------------------------------------------------------------


def test_several_operations_are_looked_for_by_one_search(trail: Trail) -> None:
    """It ends when each is known: found, below its copy, below its floor, or at the trail's start."""
    ids = trail.write(3_000, {5: "01" * 16, 500: "02" * 16, 1_500: "03" * 16, 1_600: OTHER})
    known = copy_of(ids[-1_600])
    doubts = [
        trail.doubt("01" * 16),
        trail.doubt("02" * 16, carried=None),
        trail.doubt("03" * 16, copy=known),
        trail.doubt("04" * 16, copy=known),
        trail.doubt("05" * 16, carried=b"9-" + ids[-1_700]),
    ]
    found = [(verdict.event_id, verdict.unknown) for verdict in trail.settle(*doubts)]
    assert found == [(ids[-5], ""), (ids[-500], ""), (ids[-1_500], ""), (b"", ""), (b"", "")]
    assert len(trail.pages) == pages_to(1_700)
    assert len({verdict.fence for verdict in trail.settle(*doubts)}) == 1


def test_one_operation_that_cannot_be_known_leaves_the_others(trail: Trail) -> None:
    """Of a trimmed trail."""
    ids = trail.write(300, {5: OP, 250: OTHER})
    trail.trim(200)
    known, unknown = trail.settle(trail.doubt(), trail.doubt(OTHER))
    assert known.event_id == ids[-5]
    assert unknown.unknown


def test_hundreds_of_operations_are_looked_for_500_at_a_time(trail: Trail) -> None:
    """Each is found or not by itself."""
    ops = [f"{n:032x}" for n in range(1, 1_101)]
    ids = trail.write(1_100, {n: op for n, op in enumerate(ops, 1) if n % 2})
    verdicts = trail.settle(*(trail.doubt(op) for op in ops))
    assert [verdict.event_id for verdict in verdicts] == [ids[-n] if n % 2 else b"" for n in range(1, 1_101)]
    assert len(trail.pages) == 3 * pages_to(1_102)


# --- views of one owner --------------------------------------------------------------------------------------------


def test_a_view_settles_its_owners_flows(trail: Trail) -> None:
    """As anybody."""
    ids = trail.write(500, {300: OP})
    assert trail.search(owner=b"o") == Verdict(b"1-" + ids[-1], ids[-300])


def test_a_view_learns_nothing_of_another_owners_flow(trail: Trail) -> None:
    """There is none, and it is not touched."""
    trail.write(500, {300: OP})
    before = trail.hash
    for options in ({}, {"carried": None, "brought": True, "doubtful": True}, {"copy": copy_of(b"1-1")}):
        assert trail.search(owner=b"another", **options) == Verdict(b"")
    assert trail.hash == before


def test_owners_are_told_apart_in_one_settling(trail: Trail) -> None:
    """Callers of several views wait at the same time."""
    ids = trail.write(500, {300: OP})
    own, others = trail.settle(trail.doubt(owner=b"o"), trail.doubt(owner=b"another"))
    assert (own.event_id, others) == (ids[-300], Verdict(b""))


# --- deleted flows -------------------------------------------------------------------------------------------------


def lifetime_ms(trail: Trail) -> int:
    """How long what is under the flow's key will last."""
    left: int = trail.backend.raw.pttl(trail.partition.flow(trail.member))
    return left


def test_a_flow_that_never_was_is_fenced_as_well(trail: Trail) -> None:
    """By a tombstone, for an hour: what was to create it, or change it, can no longer be applied as it is."""
    never = attrs.evolve(trail, flow_id=uuid4())
    never = attrs.evolve(never, partition=trail.flows.namespace.keyspace.partition_of(never.flow_id))
    assert never.search() == Verdict(b"1-0-0")
    assert never.search(carried=None, if_deleted=None) == Verdict(b"2-0-0")
    assert never.hash == {b"gone": b"1", b"etag": b" " * 33 + b"2-0-0"}
    assert 0 < lifetime_ms(never) <= 1000 * HOUR_S
    assert never.flows.get(never.flow_id) is None
    assert never.flows.create_managed(**IDENTITY, flow_id=never.flow_id).revision == 0
    assert never.fence.startswith(b"3-")
    assert lifetime_ms(never) == -1
    assert never.search(carried=b"3-0-0") == Verdict(never.fence)  # this is its first life


def test_a_tombstone_tells_of_the_creation_and_the_deletion(trail: Trail) -> None:
    """Whatever else was meant for the flow is answered that there is none."""
    created_by = trail.backend.raw.xrange(trail.key)[0][1][b"op"].decode()
    assert trail.flows.delete(trail.flow_id, op_id=OTHER)
    trail.backend.raw.pexpire(trail.partition.flow(trail.member), 1000)
    assert trail.search().is_deleted
    assert trail.fence == b"1-0-0"  # what the deletion made it: nobody else knew it
    assert trail.search(op=created_by, if_deleted=None).event_id == b"0-0"
    assert trail.search(op=OTHER, if_deleted=None, in_trail=False, brought=True).event_id == b"0-0"
    # That id was brought: an attempt of somebody else may still be on its way.
    assert trail.search(op=OP, if_deleted=None) == Verdict(b"2-0-0")
    assert trail.search(op=OP, if_deleted=None, carried=None) == Verdict(b"3-0-0")
    assert 1000 < lifetime_ms(trail) <= 1000 * HOUR_S  # the tombstone lasts as long as the attempt may be late
    assert trail.hash[b"past"].decode().split() == [created_by, OTHER]


def test_a_tombstone_may_not_tell_who_created_the_flow(trail: Trail) -> None:
    """Its trail was trimmed: perhaps the operation has created it."""
    trail.write(5)
    trail.trim(3)
    assert trail.flows.delete(trail.flow_id)
    assert trail.search(if_deleted=None).unknown
    assert trail.search().is_deleted


def created_anew(trail: Trail) -> Flow:
    """Delete the flow and create it anew."""
    assert trail.flows.delete(trail.flow_id)
    return trail.flows.create_managed(**IDENTITY, flow_id=trail.flow_id)


def test_an_attempt_from_before_the_flow_was_created_anew_was_not_meant_for_it(trail: Trail) -> None:
    """It knew a fence of the deleted flow. One that knows a fence of the new flow is searched for."""
    old = trail.search().fence
    created_anew(trail)
    assert trail.fence.startswith(b"3-")
    trail.write(300)
    before = trail.hash
    for carried in (b"", old, b"2-0-0"):
        assert trail.search(carried=carried).is_deleted
    assert trail.hash == before  # none of them is the flow's
    ids = trail.write(250, {200: OP})
    assert trail.search(carried=trail.fence).event_id == ids[-200]
    assert trail.search(op=OTHER, carried=trail.fence) == Verdict(trail.fence)


def test_a_creation_is_meant_for_whatever_there_is(trail: Trail) -> None:
    """And a deletion: they are about the id."""
    flow = created_anew(trail)
    assert trail.search(if_deleted=None) == Verdict(trail.fence)
    assert trail.search(op=flow.etag, if_deleted=None).event_id != b""


def test_an_operation_of_somebody_else_is_found_in_a_flow_that_was_created_anew(trail: Trail) -> None:
    """Wherever its event is. If there is none, nobody knows which of the two flows the attempt was meant for."""
    created_anew(trail)
    ids = trail.write(1_500, {50: OP, 1_300: OTHER})
    brought = {"brought": True, "doubtful": True, "carried": None, "seen": trail.partition.seen(trail.member)}
    assert trail.search(**brought).event_id == ids[-50]
    assert "deleted" in trail.search(op="ef" * 16, **brought).unknown
    assert trail.search(op=OTHER, **brought).event_id == ids[-1_300]


def test_what_was_deleted_longer_ago_than_tombstones_last_is_forgotten(trail: Trail) -> None:
    """An attempt may be late by an hour, and no more: this one knew the flow that there is."""
    created_anew(trail)
    assert trail.search().is_deleted
    hours_ago = int(trail.hash[b"created_at"]) - 2 * 1_000_000 * HOUR_S
    trail.backend.raw.hset(trail.partition.flow(trail.member), "created_at", hours_ago)
    assert trail.search() == Verdict(trail.fence)


# --- through the whole stack ---------------------------------------------------------------------------------------


def losing_one(flow_id: UUID | None, before_settling: Callable[[], object]) -> Plan:
    """Return a plan that loses the first reply to a call, and has others act before the flow is settled."""
    lost: list[bytes] = []
    acted: list[bool] = []

    def plan(command: list[bytes]) -> Fault:
        call = sent(command)
        if call is not None and not lost and flow_id in {None, call[0]}:
            lost.append(call[1])
            return CUT_REPLY
        if lost and not acted and settles(command):
            acted.append(True)
            before_settling()
        return PASS

    return plan


@pytest.mark.parametrize("name", ["update_state", "append_event", "record_step_observation", "create_managed"])
def test_a_trail_trimmed_between_two_attempts_makes_the_outcome_unknown(
    server: Server, proxy: FaultProxy, direct: FlowManager, prefix: str, name: str
) -> None:
    """The caller gets `OutcomeUnknown`, and nothing is applied twice."""
    flow_id = uuid4()
    verb: Verb = VERBS[name][2] if name in VERBS else lambda m, *_: m.create_managed(**IDENTITY, flow_id=flow_id)
    flow = prepared(direct, FlowStatus.RUNNING) if name in VERBS else None
    lengths: list[int] = []

    def trim() -> None:
        about = flow_id if flow is None else flow.id
        for _ in range(3):
            direct.append_event(about, "aside")
            direct.update_state(about, increment={"aside": 1})
        key = direct.namespace.keyspace.partition_of(about).events(str(about).encode())
        server.client().xtrim(key, maxlen=4, approximate=False)
        lengths.append(4)

    # Without a copy there is no event to end the search at.
    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = losing_one(None, trim)
        with pytest.raises(OutcomeUnknown):
            verb(flows, flow, None)  # type: ignore[arg-type]  # creation takes no flow
    assert lengths == [4]
    assert len(direct.list_events(flow_id if flow is None else flow)) == 4


@pytest.mark.parametrize("name", ["update_state", "append_event", "record_step_observation", "mutate"])
def test_a_resend_behind_more_changes_than_the_trail_keeps_is_not_applied(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """`event_maxlen` has trimmed away what the first attempt left: `OutcomeUnknown`, applied once."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    revisions: list[int] = []

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):

        def change() -> None:
            for _ in range(250):
                others.append_event(flow, "aside")
            others.update_state(flow, increment={"aside": 1})
            assert kind not in {event.kind for event in direct.iter_events(flow) if event.kind != "state_updated"}
            revisions.append(direct.get(flow).revision)  # type: ignore[union-attr]  # it exists

        verb(flows, prepared(direct, status), None)  # the server has the script: what is cut off is its reply
        proxy.plan = losing_one(flow.id, change)
        with pytest.raises(OutcomeUnknown):
            verb(flows, flow, None)
    now = direct.get(flow)
    assert now is not None
    assert [now.revision] == revisions
    assert now.state.get("n") == (5 if name == "update_state" else 0)
    assert {event.kind for event in direct.iter_events(flow)} <= {"aside", "state_updated"}


@pytest.mark.parametrize("name", ["finish", "update_state", "update_and_append"])
def test_the_last_change_of_a_flow_is_known_without_its_event(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """The flow's own etag tells, however many notes have pushed the event out."""
    status, _, verb = VERBS[name]
    flow = prepared(direct, status)

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):
        verb(flows, prepared(direct, status), None)
        proxy.plan = losing_one(flow.id, lambda: [others.append_event(flow, "aside") for _ in range(250)])
        outcome = verb(flows, flow, None)
    changed = outcome[0] if isinstance(outcome, tuple) else outcome
    assert changed == direct.get(flow)
    assert changed.revision == flow.revision + 1
    assert {event.kind for event in direct.iter_events(flow)} == {"aside"}


@pytest.mark.parametrize("name", ["update_state", "append_event", "finish"])
def test_a_resend_behind_as_many_changes_as_the_trail_keeps_is_found(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """The newest `event_maxlen` events are all there: the call answers as it would have."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    for _ in range(300):  # so that blocks are there to be dropped
        direct.append_event(flow, "before")

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):
        verb(flows, prepared(direct, status), None)
        proxy.plan = losing_one(flow.id, lambda: [others.append_event(flow, "aside") for _ in range(99)])
        verb(flows, flow, None)
    assert [event.kind for event in direct.iter_events(flow)].count(kind) == 1


@pytest.mark.parametrize("name", ["update_state", "append_event", "record_step_observation", "finish", "mutate"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_change_is_known_behind_25_000_others(
    server: Server, proxy: FaultProxy, direct: FlowManager, prefix: str, *, name: str, twice: bool
) -> None:
    """The answer is that of the first attempt, also where the reply to the resend is lost as well."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    trail = Trail(Backend(server.client(), True), direct, flow.id, direct.namespace.keyspace.partition_of(flow.id))
    losing = losing_one(flow.id, lambda: [trail.write(5_000) for _ in range(5)])
    replies: list[bytes] = []

    def plan(command: list[bytes]) -> Fault:
        fault, call = losing(command), sent(command)
        if twice and fault is PASS and call is not None and call[2].startswith(b"=") and not replies:
            replies.append(call[2])
            return CUT_REPLY
        return fault

    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=60.0) as flows:
        verb(flows, prepared(direct, status), None)
        proxy.plan = plan
        outcome = verb(flows, flow, None)
    assert len(replies) == twice
    kinds = [event.kind for event in direct.iter_events(flow)]
    assert (kinds.count(kind), kinds.count("note")) == (1 + 25_000 * (kind == "note"), 25_000 + (kind == "note"))
    if isinstance(outcome, Flow):
        assert outcome == direct.get(flow)


# --- scripts the server does not know ----------------------------------------------------------------------------


def test_a_flush_of_the_script_cache_is_not_noticed(backend: Backend, trail: Trail) -> None:
    """NOSCRIPT: the text is sent instead, once, by single calls and by each call of a batch."""
    flows, flow = trail.flows, trail.flow_id
    for change in (
        lambda: flows.start_running(flow),
        lambda: flows.append_event(flow, "note"),
        lambda: flows.record_step_observation(StepObservation(flow, "run", "task", "running")),
        lambda: flows.finish(flow),
        lambda: flows.delete(flow),
    ):
        backend.raw.script_flush()
        change()
    assert flows.get(flow) is None


def test_a_batch_survives_a_flush_of_the_script_cache(backend: Backend, trail: Trail) -> None:
    """Each call of a tick, and of a prune, is carried out once."""
    flows = trail.flows
    past = datetime.now(UTC) - timedelta(hours=1)
    due = [flows.set_waiting(flows.start_running(flows.create_managed(**IDENTITY)), Timer(at=past)) for _ in range(20)]
    backend.raw.script_flush()
    assert WaitEngine(flows).tick().resumed == 20
    assert {flows.get(flow).status for flow in due} == {FlowStatus.RUNNING}  # type: ignore[union-attr]  # they exist
    for flow in due:
        flows.finish(flow)
    backend.raw.script_flush()
    assert flows.prune_terminal_flows(timedelta(0)) == 20
    assert flows.get_many(due) == [None] * 20


def test_a_batch_whose_reply_is_lost_is_carried_out_once(proxy: FaultProxy, direct: FlowManager, prefix: str) -> None:
    """A tick that resends resumes each flow once, and counts it."""
    past = datetime.now(UTC) - timedelta(hours=1)
    due = [direct.set_waiting(prepared(direct, FlowStatus.RUNNING), Timer(at=past)) for _ in range(20)]
    lost, ops = 0, set[bytes]()

    def plan(command: list[bytes]) -> Fault:
        nonlocal lost
        call = sent(command)
        if call is None:
            return PASS
        is_resend = call[1] in ops
        ops.add(call[1])
        if is_resend and (flow := direct.get(call[0])) and flow.status is FlowStatus.RUNNING:
            direct.update_state(flow, increment={"aside": 1})  # its first attempt ran: move on
        if not is_resend and lost < 1 and call[0] == due[10].id:
            lost += 1
            return CUT_REPLY
        return PASS

    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = plan
        assert WaitEngine(flows).tick().resumed == 20
        assert lost == 1
        for flow in due:
            assert [event.kind for event in direct.iter_events(flow)].count("resumed") == 1
            direct.finish(flow)
        lost = 0
        assert flows.prune_terminal_flows(timedelta(0)) == 20
        assert lost == 1
