from __future__ import annotations

import threading
from collections import OrderedDict
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from redisflow import ExternalEvent, Flow, FlowStatus, InvalidData, Timer
from tests.support.subjects import STATE, VERBS, create, flow_in, source_of, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject

EVERYTHING = {
    "none": None,
    "yes": True,
    "int": -(2**63),
    "big": 2**63 - 1,
    "float": 0.1,
    "whole float": 2.0,
    "text": "ü\0\n{}",
    "empty text": "",
    "digits": "123",
    "bytes": b"\xff\x00-1",
    "list": [1, [], {}, [None, "x"]],
    "map": {"": {"deep": [2**63 - 1, -1]}},
    "time": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    "": "the empty key",
    "s": 1,
    "s:s": 2,
    "status": "mine",
    "key\0with: odd {chars}\n": 3,
}


def test_every_kind_of_value_comes_back(flows: Any) -> None:
    """All that can be stored is read back value for value, type for type."""
    flow = create(flows, state=EVERYTHING)
    read = flows.get(flow.id)
    assert flow.state == read.state == EVERYTHING
    assert {key: type(value) for key, value in read.state.items()} == {k: type(v) for k, v in EVERYTHING.items()}


def test_values_that_are_alike_become_plain(flows: Any) -> None:
    """Tuples become lists, mappings dicts, an enum its value, a datetime UTC; returned as `get` returns them."""
    moment = datetime(2026, 1, 2, 5, tzinfo=timezone(timedelta(hours=2)))
    given = {
        "tuple": (1, (2,)),
        "map": MappingProxyType({"a": OrderedDict(b=1)}),
        "enum": FlowStatus.RUNNING,
        "time": moment,
    }
    flow = flows.update_state(flow_in(flows, "running", state={}), given)
    expected = {"tuple": [1, [2]], "map": {"a": {"b": 1}}, "enum": "running", "time": moment}
    assert flow.state == flows.get(flow.id).state == expected
    assert type(flow.state["map"]) is type(flow.state["map"]["a"]) is dict
    assert type(flow.state["enum"]) is str
    assert flow.state["time"].tzinfo is UTC


def test_the_merge_is_shallow(flows: Any) -> None:
    """A patch's keys replace the state's; nothing inside them is merged, nothing else is touched."""
    flow = flow_in(flows, "running", state={"a": {"x": 1}, "b": [1], "c": 0})
    flow = flows.update_state(flow, {"a": {"y": 2}, "d": None})
    assert flow.state == {"a": {"y": 2}, "b": [1], "c": 0, "d": None}
    assert flows.get(flow.id) == flow


def test_the_state_is_patched_and_the_step_moved(flows: Any) -> None:
    """As the reference has it: status stays, step moves, untouched keys stay."""
    flow = flows.update_state(flow_in(flows, "running"), {"processed": 3, "errors": []}, next_step="fetch")
    assert (flow.status, flow.current_step) == (FlowStatus.RUNNING, "fetch")
    assert flow.state == {"processed": 3, "messages": 10, "errors": []}


@pytest.mark.parametrize("status", ["created", "running", "waiting"])
def test_the_state_is_updated_in_any_live_status(flows: Any, status: str) -> None:
    """The status stays, and so does a wait."""
    before = flow_in(flows, status, wait=ExternalEvent("approvals", "42"))
    after = flows.update_state(before, {"x": 1})
    assert (after.status, after.wait, after.revision) == (before.status, before.wait, before.revision + 1)
    assert after.current_step == before.current_step


@pytest.mark.parametrize("state", [[1, "a"], "text", 7, None, True, 1.5, b"bytes", datetime(2026, 1, 1, tzinfo=UTC)])
def test_a_state_need_not_be_a_mapping(flows: Any, state: Any) -> None:
    """A patch that is no mapping replaces the whole state; one that is replaces what is no mapping."""
    flow = flow_in(flows, "running", state={"a": 1, "b": 2})
    if state is not None:
        flow = flows.update_state(flow, state)
        assert flow.state == flows.get(flow.id).state == state
        flow = flows.update_state(flow, state)
        assert flow.state == state
        assert create(flows, state=state).state == state
    else:
        flow, _ = flows.update_and_append(attrs.evolve(flow, state=None), "emptied")
        assert flow.state is flows.get(flow.id).state is None
    flow = flows.update_state(flow, {"c": 3})
    assert flow.state == flows.get(flow.id).state == {"c": 3}


def test_an_empty_patch_of_no_mapping_leaves_an_empty_mapping(flows: Any) -> None:
    """A mapping replaces a state that is none, also an empty one; no patch at all leaves it."""
    flow = flow_in(flows, "running", state=[1])
    assert flows.update_state(flow, next_step="x").state == [1]
    assert flows.update_state(flow, {}).state == {}
    assert flows.get(flow.id).state == {}


@pytest.mark.parametrize("verb", ["resume", "finish"])
def test_resume_and_finish_merge_as_an_update_does(flows: Any, verb: str) -> None:
    """Shallow into a mapping, in place of anything else."""
    move = getattr(flows, verb)
    status = source_of(verb)
    assert move(flow_in(flows, status, state={"a": 1, "b": {"x": 1}}), {"b": 2}).state == {"a": 1, "b": 2}
    assert move(flow_in(flows, status, state=[1]), {"b": 2}).state == {"b": 2}
    assert move(flow_in(flows, status, state={"a": 1}), [2]).state == [2]
    assert move(flow_in(flows, status, state=[1])).state == [1]


def test_a_failure_replaces_a_state_that_is_no_mapping(flows: Any) -> None:
    """The failure is a patch that is a mapping, and merges as one."""
    flow = flows.fail(flow_in(flows, "running", state=[1, 2]), "broken")
    assert flow.state.keys() == {"failure"}
    assert flows.get(flow.id) == flow


def test_a_large_state_is_written_whole(flows: Any) -> None:
    """More fields than one command of a script takes, at creation and in a patch."""
    large = {f"key {n}": n for n in range(9001)}
    flow = create(flows, state=large)
    assert flow.state == flows.get(flow.id).state == large
    flow = flows.update_state(flow, {key: str(value) for key, value in large.items()})
    assert flow.state == flows.get(flow.id).state == {key: str(value) for key, value in large.items()}
    flow = flows.update_state(flow, unset=large)
    assert flow.state == flows.get(flow.id).state == {}


# --- increment and unset -------------------------------------------------------------------------------


def test_integers_are_incremented_in_the_server(flows: Any) -> None:
    """An absent key counts as 0; deltas may be negative; the event tells what was added."""
    flow = flow_in(flows, "running")
    flow = flows.update_state(flow, increment={"messages": -3, "new": 5})
    assert flow.state == flows.get(flow.id).state == {"messages": 7, "processed": 0, "new": 5}
    flow = flows.update_state(flow.id, {"x": 1}, increment={"new": 1}, unset=["processed"])
    assert flow.state == flows.get(flow.id).state == {"messages": 7, "new": 6, "x": 1}
    *_, (kind, revision, payload) = trail(flows, flow)
    assert (kind, revision) == ("state_updated", 3)
    assert payload["patch"] == {"x": 1}
    assert payload["increment"] == {"new": 1}


@pytest.mark.parametrize(
    ("value", "delta"),
    [(2**63 - 1, 1), (-(2**63), -1), (0, 2**63), ("5", 1), (1.5, 1), (True, 1), (None, 1), ([], 1), (2**62, 2**62)],
)
def test_what_is_no_integer_is_not_incremented(flows: Any, subject: Subject, value: Any, delta: int) -> None:
    """Another type, or a sum beyond 64 bits: InvalidData naming the key, nothing changed."""
    flow = flow_in(flows, "running", state={"count": value, "other": 1})
    before = subject.snapshot()
    for ref in (flow, flow.id):
        with pytest.raises(InvalidData, match="count"):
            flows.update_state(ref, {"x": 1}, increment={"other": 1, "count": delta})
    assert subject.snapshot() == before


@pytest.mark.parametrize(
    ("value", "delta"), [(2**63 - 2, 1), (-(2**63) + 1, -1), (2**63 - 1, -(2**63)), (-(2**53) - 1, 2), (-1, 1)]
)
def test_sums_are_exact_up_to_the_bounds(flows: Any, value: int, delta: int) -> None:
    """64-bit integers are added as such, not as floats."""
    flow = flows.update_state(create(flows, state={"n": value}), increment={"n": delta})
    assert flow.state["n"] == flows.get(flow.id).state["n"] == value + delta


def test_a_state_that_is_no_mapping_has_nothing_to_increment(flows: Any, subject: Subject) -> None:
    """InvalidData, nothing changed."""
    flow = create(flows, state=[1])
    before = subject.snapshot()
    with pytest.raises(InvalidData, match="mapping"):
        flows.update_state(flow, increment={"n": 1})
    assert subject.snapshot() == before


def test_many_writers_increment_without_losing_any(flows: Any, subject: Subject) -> None:
    """No revision, no retry: every addition counts."""
    flow = flow_in(flows, "running")

    def add() -> None:
        for _ in range(10):
            flows.update_state(flow, increment={"processed": 1})

    workers = [threading.Thread(target=add) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    after = flows.get(flow.id)
    assert (after.state["processed"], after.revision) == (50, 51)
    assert [event.revision for event in flows.iter_events(flow)] == list(range(52))


def test_unset_removes_keys(flows: Any) -> None:
    """Keys there and not there, given as any iterable; the event names them."""
    flow = flow_in(flows, "running", state={"tmp": 1, "keep": 2})
    flow = flows.update_state(flow, unset=iter(["tmp", "never there"]))
    assert flow.state == flows.get(flow.id).state == {"keep": 2}
    assert trail(flows, flow)[-1][2]["unset"] == ["tmp", "never there"]


# --- the caller's copy ---------------------------------------------------------------------------------


def references(flows: Any, flow: Flow) -> list[Any]:
    """Every way to name a flow: the current copy, an old one, the UUID, its text."""
    return [flow, flow.id, str(flow.id), flows.get(flow.id)]


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_returns_is_what_get_returns(flows: Any, verb: str) -> None:
    """Value for value, whatever the flow was named by."""
    for kind in range(4):
        wait = Timer(at=datetime(2031, 1, 1, tzinfo=UTC))
        flow = flow_in(flows, source_of(verb), state=EVERYTHING | STATE, wait=wait)
        after = VERBS[verb](flows, references(flows, flow)[kind])
        assert after == flows.get(flow.id)


@pytest.mark.parametrize("verb", VERBS)
def test_an_old_copy_is_as_good_as_an_id(flows: Any, verb: str) -> None:
    """Without an expectation a stale Flow is just a name: the answer has the other writer's changes too."""
    flow = flow_in(flows, source_of(verb))
    flows.update_state(flow.id, {"other": "writer"}, next_step="elsewhere")
    after = VERBS[verb](flows, flow)
    assert after.state["other"] == "writer"
    assert after.revision == flow.revision + 2
    assert after == flows.get(flow.id)


@pytest.mark.parametrize("verb", VERBS)
def test_an_altered_copy_never_leaks(flows: Any, verb: str) -> None:
    """What was not stored is neither stored nor returned: by `evolve`, or written into the state."""
    flow = flow_in(flows, source_of(verb), state=STATE | {"list": [1]})
    flow.state["leak"] = 1
    flow.state["list"].append(2)
    altered = attrs.evolve(
        flow, goal="other", current_step="leak", state={"leak": 2}, wait={"kind": "leak"}, owner_session_key="thief"
    )
    after = VERBS[verb](flows, altered)
    assert after == flows.get(flow.id)
    assert "leak" not in after.state
    assert after.state["list"] == [1]
    assert (after.goal, after.owner_session_key) == (flow.goal, flow.owner_session_key)
    assert after.current_step == ("fetch" if verb == "update_state" else flow.current_step)
    assert after.wait != {"kind": "leak"}


def test_writing_into_what_a_verb_returned_changes_no_other_copy(flows: Any) -> None:
    """Each Flow has a state of its own."""
    first = flow_in(flows, "running", state={"list": [1]})
    second = flows.update_state(first, {"x": 1})
    second.state["list"].append(2)
    second.state["x"] = 2
    third = flows.update_state(second, {"y": 1})
    assert first.state == {"list": [1]}
    assert third.state == flows.get(first.id).state == {"list": [1], "x": 1, "y": 1}
