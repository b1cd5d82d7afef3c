from __future__ import annotations

import itertools
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from redisflow import FlowStatus, Manual
from tests.support.subjects import WHO, create, flow_in, observed

if TYPE_CHECKING:
    from redisflow import Flow
    from tests.support.subjects import Subject

OWNER = WHO["owner_session_key"]


@pytest.fixture
def many(flows: Any) -> list[Flow]:
    """Twenty-five running flows, spread over the partitions, in the order of their creation."""
    made = [flows.create_mirrored(**WHO, state={"n": n}) for n in range(25)]
    assert len({flow.id.int % 16 for flow in made}) > 5
    return made


@pytest.fixture
def narrow(subject: Subject) -> Any:
    """A manager of a namespace with one partition and forty running flows in it: more than is read ahead."""
    flows = subject.manager(prefix=f"{subject.prefix}.narrow", partitions=1)
    for n in range(40):
        flows.create_mirrored(**WHO, state={"n": n})
    return flows


def numbers(flows: Any) -> list[int]:
    """Return which flows of `many` these are."""
    return [flow.state["n"] for flow in flows]


def test_an_owners_flows_come_newest_first(flows: Any, many: list[Flow]) -> None:
    """By creation, over all partitions and statuses, whatever changed since; other owners' do not."""
    flows.cancel(many[3])
    many[5] = flows.update_state(many[5], {"x": 1})
    create(flows, owner_session_key="agent:other")
    listed = flows.list_by_owner(OWNER)
    assert numbers(listed) == list(range(24, -1, -1))
    assert listed[19] == many[5]
    assert numbers(flows.iter_by_owner(OWNER)) == numbers(listed)
    assert flows.list_by_owner("agent:nobody") == []


def test_a_statuss_flows_come_longest_unchanged_first(flows: Any, many: list[Flow]) -> None:
    """By last change, over all partitions: one just changed is last."""
    for n in (7, 0, 12):
        flows.update_state(many[n].id, {"x": 1})
    order = [n for n in range(25) if n not in {7, 0, 12}] + [7, 0, 12]
    assert numbers(flows.list_by_status("running")) == order
    assert numbers(flows.list_by_status(FlowStatus.RUNNING)) == order
    assert numbers(flows.iter_by_status("running", page=4)) == order
    assert flows.list_by_status("created") == []


@pytest.mark.parametrize("limit", [1, 2, 16, 24, 25, 26, 10_000, 0, -1, -(10**9)])
def test_a_limit_is_kept(flows: Any, many: list[Flow], limit: int) -> None:
    """The first so many; none below 1."""
    kept = max(0, limit)
    assert numbers(flows.list_by_status("running", limit=limit)) == list(range(25))[:kept]
    assert numbers(flows.list_by_owner(OWNER, limit=limit)) == list(range(24, -1, -1))[:kept]


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_small_pages_come_to_the_same(flows: Any, many: list[Flow], page: int) -> None:
    """Whatever the page: everything, once, in order."""
    assert numbers(flows.iter_by_status("running", page=page)) == list(range(25))
    assert numbers(flows.iter_by_owner(OWNER, page=page)) == list(range(24, -1, -1))


def test_quiet_flows_are_found_by_their_last_change(flows: Any, many: list[Flow]) -> None:
    """`updated_before` is exclusive, takes any zone, and goes with a limit."""
    moment = many[10].updated_at
    assert numbers(flows.list_by_status("running", updated_before=moment)) == list(range(10))
    assert numbers(flows.list_by_status("running", updated_before=moment + timedelta(microseconds=1)))[-1] == 10
    assert numbers(flows.list_by_status("running", updated_before=moment.astimezone(), limit=4)) == [0, 1, 2, 3]
    assert numbers(flows.iter_by_status("running", updated_before=moment, page=3)) == list(range(10))
    assert flows.list_by_status("running", updated_before=datetime(1970, 1, 1, tzinfo=UTC)) == []
    everything = flows.list_by_status("running", updated_before=datetime(9999, 1, 1, tzinfo=UTC))
    assert numbers(everything) == list(range(25))


def test_flows_of_one_moment_all_come(flows: Any, subject: Subject, many: list[Flow]) -> None:
    """Equal scores, more than a page of them: each once."""
    for partition in subject.keyspace.partitions:
        key = partition.status(FlowStatus.RUNNING)
        members: Any = subject.raw.zrange(key, 0, -1)
        if members:
            subject.raw.zadd(key, dict.fromkeys(members, 1_700_000_000_000_000))
    for page in (1, 2, 7):
        assert sorted(numbers(flows.iter_by_status("running", page=page))) == list(range(25))


@pytest.mark.parametrize("page", [1, 3, 15, 39, 40])
def test_pages_within_one_partition_come_to_the_same(narrow: Any, page: int) -> None:
    """Also where a partition is read piece by piece."""
    assert numbers(narrow.iter_by_status("running", page=page)) == list(range(40))
    assert numbers(narrow.iter_by_owner(OWNER, page=page)) == list(range(39, -1, -1))
    assert numbers(narrow.list_by_owner(OWNER, limit=page)) == list(range(39, -1, -1))[:page]


def test_iterating_goes_on_while_flows_leave(narrow: Any) -> None:
    """Flows that end meanwhile do not shift the others: each that stays comes once."""
    seen = []
    for flow in narrow.iter_by_status("running", page=2):
        seen.append(flow.state["n"])
        narrow.finish(flow)
    assert seen == list(range(40))
    seen = []
    for flow in narrow.iter_by_owner(OWNER, page=2):
        seen.append(flow.state["n"])
        narrow.delete(flow)
    assert seen == list(range(39, -1, -1))


def test_a_flow_that_left_before_its_page_is_not_listed(flows: Any, many: list[Flow]) -> None:
    """What is yielded by status has the status."""
    listing = flows.iter_by_status("running", page=3)
    first = list(itertools.islice(listing, 3))
    for flow in many[3:15]:
        flows.cancel(flow.id)
    rest = list(listing)
    assert numbers([*first, *rest]) == [0, 1, 2, *range(15, 25)]
    assert {flow.status for flow in rest} == {FlowStatus.RUNNING}


def test_changing_each_flow_while_iterating_comes_to_an_end(narrow: Any) -> None:
    """Every change moves a flow to the end of the order; the iteration must not chase it for ever."""
    seen = []
    for flow in narrow.iter_by_status("running", page=3):
        seen.append(flow.state["n"])
        assert len(seen) <= 120, "the iteration meets what it has seen again and again"
        narrow.update_state(flow.id, {"x": 1})
    assert set(seen) == set(range(40))


def test_new_flows_do_not_disturb_an_owners_listing(flows: Any, many: list[Flow]) -> None:
    """They are newer than where it began."""
    listing = flows.iter_by_owner(OWNER, page=2)
    seen = numbers(itertools.islice(listing, 3))
    flows.create_mirrored(**WHO, state={"n": 99})
    assert seen + numbers(listing) == list(range(24, -1, -1))


def test_an_iterator_may_be_left_early(flows: Any, many: list[Flow]) -> None:
    """Whoever stops reading leaves nothing behind that would hinder others."""
    for _ in range(60):  # more than there are connections
        assert next(iter(flows.iter_by_owner(OWNER, page=1))).state["n"] == 24


def test_flows_are_counted_by_status(flows: Any) -> None:
    """Every status is there, empty ones as 0, in all partitions together."""
    assert flows.count_by_status() == dict.fromkeys(FlowStatus, 0)
    for status, count in zip(FlowStatus, (3, 1, 2, 4, 1, 2), strict=True):
        for _ in range(count):
            flow_in(flows, status)
    counts = flows.count_by_status()
    assert counts == dict(zip(FlowStatus, (3, 1, 2, 4, 1, 2), strict=True))
    assert all(isinstance(status, FlowStatus) for status in counts)


@pytest.mark.parametrize("junk", [b"not a uuid", b"\xff\xfe", b""])
def test_an_index_entry_that_makes_no_sense_hides_no_flow(
    flows: Any, subject: Subject, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    """A member that is no flow id: logged, left out, the rest still comes."""
    caplog.set_level(logging.WARNING)
    flow = flow_in(flows, "running", wait=Manual())
    partition = subject.keyspace.partition_of(flow.id)
    for key in (partition.owner(OWNER.encode()), partition.status(FlowStatus.RUNNING)):
        subject.raw.zadd(key, {junk: 1})
    assert flows.list_by_status("running") == [flow]
    assert flows.list_by_owner(OWNER) == [flow]
    assert list(flows.iter_by_status("running", page=1)) == [flow]
    subject.raw.zadd(partition.status(FlowStatus.FINISHED), {junk: 1})
    ended = flow_in(flows, "finished")
    assert flows.prune_terminal_flows(timedelta(0)) == 1
    assert flows.get(ended.id) is None


# --- deleting ------------------------------------------------------------------------------------------


def full(flows: Any, status: str, **options: Any) -> Flow:
    """A flow with every key a flow can have."""
    flow = flow_in(flows, status, **options)
    flows.record_step_observation(observed(flow.id))
    flows.append_event(flow, "note")
    return flow


@pytest.mark.parametrize("status", list(FlowStatus))
def test_deleting_leaves_a_tombstone_alone(flows: Any, subject: Subject, status: FlowStatus) -> None:
    """Live or ended, by Flow, id or text. A second deletion reports that there is no flow."""
    gone: list[Flow] = []
    wait = {"kind": "external_event", "topic": "t", "correlation_id": "c", "deadline": "2031-01-01T00:00:00Z"}
    for how in (lambda f: f, lambda f: f.id, lambda f: str(f.id)):
        flow = full(flows, status, wait=wait)
        assert flows.delete(how(flow)) is True
        gone.append(flow)
        assert flows.get(flow.id) is None
        assert subject.only_tombstones_of(*(one.id for one in gone))
        assert flows.delete(how(flow)) is False
    assert subject.only_tombstones_of(*(one.id for one in gone))
    assert flows.get_many(gone) == [None] * 3
    assert flows.list_by_owner(OWNER) == flows.list_by_status(status) == []


def test_deleting_one_flow_leaves_the_others(flows: Any) -> None:
    """Only its own keys and entries go."""
    first, second = full(flows, "waiting"), full(flows, "waiting")
    assert flows.delete(first)
    assert flows.list_by_owner(OWNER) == flows.list_by_status("waiting") == [second]
    assert len(flows.list_steps(second)) == 1


def aged(subject: Subject, flow: Flow, by: timedelta) -> None:
    """Make a flow's last change older than it is."""
    at = int((flow.updated_at - by).timestamp() * 1_000_000)
    partition = subject.keyspace.partition_of(flow.id)
    subject.raw.hset(subject.flow_key(flow.id), "updated_at", at)
    subject.raw.zadd(partition.status(flow.status), {str(flow.id): at})


def test_pruning_deletes_old_ended_flows_and_counts_them(flows: Any, subject: Subject) -> None:
    """Every terminal status, only those unchanged for that long, never a live one.

    Those that changed within the last hour leave a tombstone.
    """
    recent = []
    for status in FlowStatus:
        for _ in range(2):
            aged(subject, full(flows, status), timedelta(days=31))
            recent.append(full(flows, status))
    assert flows.prune_terminal_flows(timedelta(days=365)) == 0
    assert flows.prune_terminal_flows(timedelta(days=30)) == 6
    assert flows.count_by_status() == {status: 2 if status.is_terminal else 4 for status in FlowStatus}
    assert flows.prune_terminal_flows(timedelta(0)) == 6
    assert flows.count_by_status() == {status: 0 if status.is_terminal else 4 for status in FlowStatus}
    deleted = [flow for live in ("created", "running", "waiting") for flow in flows.list_by_status(live)]
    for flow in deleted:
        assert flows.delete(flow)
    left = {flow.id for flow in deleted} | {flow.id for flow in recent if flow.status.is_terminal}
    assert subject.only_tombstones_of(*left)


def test_pruning_never_deletes_a_live_flow(flows: Any, subject: Subject) -> None:
    """Whatever an index says, the flow's own status and time decide."""
    live = [full(flows, status) for status in ("created", "running", "waiting")]
    recent = full(flows, "finished")
    for flow in [*live, recent]:
        partition = subject.keyspace.partition_of(flow.id)
        subject.raw.zadd(partition.status(FlowStatus.FINISHED), {str(flow.id): 1})
    assert flows.prune_terminal_flows(timedelta(days=1)) == 0
    assert flows.get_many([*live, recent]) == [*live, recent]


def test_pruning_goes_through_all_pages(flows: Any, subject: Subject) -> None:
    """More than one page, in all partitions; huge ages are no error."""
    with_many = [flows.cancel(create(flows)) for _ in range(40)]
    assert flows.prune_terminal_flows(timedelta.max) == 0
    for flow in with_many:
        aged(subject, flow, timedelta(hours=1, minutes=1))
    assert flows.prune_terminal_flows(timedelta(0)) == len(with_many)
    assert subject.all_keys() == []
