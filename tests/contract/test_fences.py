"""A flow that was settled has a fence, and is used as any other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import FlowExists, FlowNotFound, FlowStatus, InvalidData, OutcomeUnknown
from redisflow.scripts import SETTLE
from tests.support.subjects import (
    STATE,
    VERBS,
    WHO,
    brought_id,
    create,
    drawn_id,
    flow_in,
    observed,
    sent_by,
    source_of,
    trail,
)

if TYPE_CHECKING:
    from redisflow import Flow
    from redisflow.calls import Packet
    from tests.support.subjects import Subject

OWNER = WHO["owner_session_key"]

CHANGES: dict[str, Callable[..., Any]] = VERBS | {
    "append_event": lambda flows, ref, **o: flows.append_event(ref, "note", {"n": 1}, **o),
    "record_step_observation": lambda flows, ref, **o: flows.record_step_observation(observed(ref), **o),
    "mutate": lambda flows, ref, **o: flows.mutate(ref, lambda f: attrs.evolve(f, state=[1]), kind="counted", **o),
    "update_and_append": lambda flows, flow, **o: flows.update_and_append(
        attrs.evolve(flow, current_step="sort"), "sorted", {"by": "date"}, **o
    ),
}
ALWAYS_A_COPY = {"update_and_append"}


def fence(subject: Subject, flow: Flow) -> None:
    """Give a flow the next fence, as the settlement of a lost attempt does."""
    before = subject.fence_of(flow.id)
    with subject.rival() as rival:
        rival.append_event(flow.id, "settled", op_id=drawn_id())
    assert subject.fence_of(flow.id) != before


def attempts(packets: list[Packet]) -> int:
    """Count the attempts of a call, of which none was lost."""
    commands = [tuple(command) for packet in packets for command in packet.commands]
    assert {command[0] for command in commands} == {b"EVALSHA"}
    assert SETTLE.source.sha not in {command[1] for command in commands}
    return len(commands)


# --- what a fenced flow takes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_a_fenced_flow_takes_every_change(flows: Any, subject: Subject, name: str) -> None:
    """By id, by a copy from before the fence and by one from after it; each is applied once, under any id."""
    forms = ("old copy", "new copy") if name in ALWAYS_A_COPY else ("id", "old copy", "new copy")
    new_ids: list[Callable[[], str | None]] = [lambda: None, brought_id, drawn_id]
    for form, new_id in product(forms, new_ids):
        old = flow_in(flows, source_of(name))
        fence(subject, old)
        ref = {"id": old.id, "old copy": old, "new copy": flows.get(old.id)}[form]
        known = trail(flows, old)
        changed = CHANGES[name](flows, ref, op_id=new_id(), expected_revision=old.revision)
        assert len(trail(flows, old)) == len(known) + 1
        after = flows.get(old.id)
        assert subject.fence_of(old.id) != b""
        if name in VERBS or name == "mutate":
            assert changed == after
            assert after.revision == old.revision + 1
        assert flows.append_event(old.id, "aside").revision == after.revision


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "mutate"])
def test_an_attempt_that_knows_an_old_fence_is_sent_again_once(flows: Any, subject: Subject, name: str) -> None:
    """It was not applied, so nothing needs settling. A copy from after the fence costs no second attempt."""
    for form in ("old copy", "new copy") if name in ALWAYS_A_COPY else ("id", "old copy", "new copy"):
        old = flow_in(flows, source_of(name))
        fence(subject, old)
        ref = {"id": old.id, "old copy": old, "new copy": flows.get(old.id)}[form]
        known = trail(flows, old)
        with subject.rival() as rival, sent_by(rival) as packets:
            other = flow_in(flows, source_of(name), flow_id=UUID(int=old.id.int ^ 2**64))  # on the same node
            CHANGES[name](rival, other.id if form == "id" else other)  # the server knows the script from now on
            packets.clear()
            CHANGES[name](rival, ref)
            assert attempts(packets) == (1 if form == "new copy" else 2)
            packets.clear()
            rival.append_event(old.id, "aside")
            # The manager notes a fence that it was told, not those of the copies it is given.
            assert attempts(packets) == (2 if form == "new copy" else 1)
        assert len(trail(flows, old)) == len(known) + 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_fence_is_another(flows: Any, subject: Subject, verb: str) -> None:
    """Settled again and again, between changes by an old copy, a current one and the id."""
    flow = flow_in(flows, source_of(verb))
    fences = [subject.fence_of(flow.id)]
    for _ in range(3):
        fence(subject, flow)
        fences.append(subject.fence_of(flow.id))
        flow = flows.update_state(flow, {"x": 1}) if verb != "start_running" else flow
    after = VERBS[verb](flows, flow)
    assert after == flows.get(flow.id)
    assert len(set(fences)) == 4
    assert fences[0] == b""


def test_a_fenced_flow_is_read_listed_and_deleted_as_any_other(flows: Any, subject: Subject) -> None:
    """Its fence is in no field of a `Flow`; the doctor has nothing to say of it."""
    plain = flow_in(flows, "running")
    fenced = flow_in(flows, "running")
    fence(subject, fenced)
    assert flows.get(fenced.id) == fenced
    assert len(flows.get(fenced.id).etag) == 32
    assert flows.list_by_owner(OWNER) == [fenced, plain]
    assert flows.list_by_status("running") == [plain, fenced]
    about = [finding for finding in flows.doctor().findings if finding.flow_id == fenced.id]
    assert about == []
    assert flows.delete(fenced)
    assert flows.get(fenced.id) is None
    assert subject.is_tombstone(fenced.id)


def test_a_fenced_flow_is_pruned_and_waited_for(flows: Any, subject: Subject) -> None:
    """By managers that know nothing of its fence."""
    flow = flow_in(flows, "running")
    fence(subject, flow)
    assert subject.manager().finish(flow.id) == flows.wait_for(flow, timeout=5)
    fence(subject, flow)
    assert subject.manager().prune_terminal_flows(timedelta(0)) == 1
    assert flows.get(flow.id) is None


# --- settling an id of the library's -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "moved_on"), [*((name, length) for name in CHANGES for length in (0, 120)), ("update_state", 2500)]
)
def test_an_applied_operation_is_found_by_the_id_the_library_drew(
    flows: Any, subject: Subject, name: str, moved_on: int
) -> None:
    """However much was written since, and whatever copy the caller has by now: nothing is applied again."""
    old = flow_in(flows, source_of(name))
    CHANGES[name](flows, old)
    op_id = flows.list_events(old, 1)[0].op_id
    assert op_id[12:16] == "f10f"
    subject.lengthen(old.id, moved_on)
    moved = flows.get(old.id)
    if moved_on and not moved.status.is_terminal and not moved.cancel_requested:
        moved = flows.mutate(old.id, lambda flow: flow, kind="moved on")
    before = subject.unfenced()
    for ref in (old, moved) if name in ALWAYS_A_COPY else (old.id, old, moved):
        answer = CHANGES[name](flows, ref, op_id=op_id)
        if name in VERBS or name == "mutate":
            assert answer == moved
        assert subject.unfenced() == before


@pytest.mark.parametrize("name", CHANGES)
def test_an_operation_that_was_never_applied_is_applied_once(flows: Any, subject: Subject, name: str) -> None:
    """Where the trail is whole: under the id that the caller settles, then recognized by it."""
    for by_copy in (True,) if name in ALWAYS_A_COPY else (True, False):
        flow = flow_in(flows, source_of(name))
        subject.lengthen(flow.id, 120)
        ref, op_id = (flow if by_copy else flow.id), drawn_id()
        first = CHANGES[name](flows, ref, op_id=op_id)
        before = subject.unfenced()
        for _ in range(2):
            assert CHANGES[name](flows, ref, op_id=op_id) == first
        assert subject.unfenced() == before
        assert sum(event.op_id == op_id for event in flows.iter_events(flow)) == 1


UNKNOWN_IDS: dict[str, Callable[[str], str]] = {"applied": lambda op_id: op_id, "never applied": lambda _: drawn_id()}


@pytest.mark.parametrize("which", UNKNOWN_IDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_trimmed_trail_leaves_the_outcome_unknown(flows: Any, subject: Subject, name: str, which: str) -> None:
    """The event may be among those that are gone: `OutcomeUnknown`, and nothing but the fence is changed."""
    old = flow_in(flows, source_of(name))
    CHANGES[name](flows, old)
    op_id = UNKNOWN_IDS[which](flows.list_events(old, 1)[0].op_id)
    takes_more = not flows.get(old.id).status.is_terminal and not flows.get(old.id).cancel_requested
    if takes_more:
        flows.mutate(old.id, lambda flow: flow, kind="moved on")
    else:
        subject.raw.hset(subject.flow_key(old.id), "etag", "ab" * 16)  # or it would tell
    current = flows.get(old.id)
    subject.lengthen(old.id, 150)
    subject.trim(old.id, 151 if takes_more else 150)  # so that the last change's own event is still there
    before = subject.unfenced()
    for ref in (old, current) if name in ALWAYS_A_COPY else (old.id, old, current):
        with pytest.raises(OutcomeUnknown) as unknown:
            CHANGES[name](flows, ref, op_id=op_id)
        assert unknown.value.op_id == op_id
        assert subject.unfenced() == before
    assert flows.get(old.id) == current


@pytest.mark.parametrize("verb", VERBS)
def test_the_last_change_is_known_without_its_event(flows: Any, subject: Subject, verb: str) -> None:
    """By the etag, though the trail was trimmed."""
    flow = VERBS[verb](flows, flow_in(flows, source_of(verb)))
    subject.lengthen(flow.id, 5)
    subject.trim(flow.id, 2)
    before = subject.unfenced()
    assert VERBS[verb](flows, flow.id, op_id=flow.etag) == flow
    assert subject.unfenced() == before


def test_an_event_that_is_called_created_makes_no_trail_whole(flows: Any, subject: Subject) -> None:
    """An application may append one at revision 0: what is before it may be gone all the same."""
    flow = create(flows)
    applied = flows.append_event(flow, "note").op_id
    flows.append_event(flow, "created", {"controller_id": "c", "goal": "g", "current_step": "s"})
    subject.trim(flow.id, 1)
    assert [(event.kind, event.revision) for event in flows.list_events(flow)] == [("created", 0)]
    before = subject.unfenced()
    for op_id in (applied, drawn_id()):
        with pytest.raises(OutcomeUnknown):
            flows.append_event(flow.id, "note", op_id=op_id)
        with pytest.raises(OutcomeUnknown):
            flows.start_running(flow.id, op_id=op_id)
    assert subject.unfenced() == before
    for op_id in (brought_id(), drawn_id(), flow.etag):
        if op_id == flow.etag:
            subject.raw.hset(subject.flow_key(flow.id), "etag", "ab" * 16)
        with pytest.raises(OutcomeUnknown):
            flows.create_managed(**WHO, flow_id=flow.id, op_id=op_id)
    with pytest.raises(FlowExists):
        flows.create_managed(**WHO, flow_id=flow.id)


@pytest.mark.parametrize("trimmed", [False, True])
def test_an_event_of_another_operation_is_no_creation(flows: Any, subject: Subject, *, trimmed: bool) -> None:
    """A creation under an id that was used for something else does not hand out the flow."""
    flow = create(flows)
    event = flows.append_event(flow, "created")
    if trimmed:
        subject.trim(flow.id, 1)
    before = subject.unfenced()
    with pytest.raises((FlowExists, InvalidData, OutcomeUnknown)):
        flows.create_managed(**WHO, flow_id=flow.id, op_id=event.op_id)
    assert subject.unfenced() == before


@pytest.mark.parametrize("method", ["create_managed", "create_mirrored"])
@pytest.mark.parametrize("chosen", [True, False], ids=["id-chosen", "id-not-chosen"])
def test_a_creation_is_settled_by_the_id_the_library_drew(
    flows: Any, subject: Subject, method: str, *, chosen: bool
) -> None:
    """Not applied, it is applied once; applied, it answers with the flow as it stands, also over a tombstone."""
    flow_id, make = (uuid4() if chosen else None), getattr(flows, method)
    if flow_id is not None:
        create(flows, flow_id=flow_id)
        flows.delete(flow_id)
    op_id = drawn_id()
    first = make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id)
    assert make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id) == first
    moved = flows.cancel(first.id)
    subject.lengthen(first.id, 120)
    before = subject.unfenced()
    for _ in range(2):
        assert make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id) == moved
    assert subject.unfenced() == before


def test_an_operation_meant_for_a_deleted_flow_is_not_applied_to_the_next(flows: Any, subject: Subject) -> None:
    """Nobody knows which of the two it was meant for: `OutcomeUnknown`, and the second is as it was."""
    first = flow_in(flows, "running")
    first = flows.update_state(first, increment={"processed": 1})
    flows.delete(first)
    anew = flow_in(flows, "running", flow_id=first.id)
    before = subject.unfenced()
    for ref in (first.id, first):
        with pytest.raises(OutcomeUnknown):
            flows.update_state(ref, increment={"processed": 1}, op_id=first.etag)
    assert subject.unfenced() == before
    assert flows.get(first.id) == anew


def test_a_view_settles_its_owners_flows_alone(flows: Any, subject: Subject) -> None:
    """To a view another owner's flow does not exist: it gets no fence by it."""
    theirs = flow_in(flows, "running")
    with pytest.raises(FlowNotFound):
        flows.for_owner("agent:eve").update_state(theirs.id, {"x": 1}, op_id=drawn_id())
    assert subject.fence_of(theirs.id) == b""
    mine = flows.for_owner(OWNER)
    op_id = drawn_id()
    first = mine.update_state(theirs.id, increment={"processed": 1}, op_id=op_id)
    assert mine.update_state(theirs.id, increment={"processed": 1}, op_id=op_id) == first
    assert first.state["processed"] == 1
    assert first.status is FlowStatus.RUNNING


# --- ids that callers bring ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "mutate"])
def test_a_brought_id_is_known_however_much_was_written_since(flows: Any, subject: Subject, name: str) -> None:
    """By the flow's index of such ids: one script, which reads no more of the trail than the event it left."""
    flow = flow_in(flows, source_of(name))
    op_id = brought_id()
    first = CHANGES[name](flows, flow, op_id=op_id)
    assert subject.raw.zcard(subject.seen_key(flow.id)) == 1
    assert subject.raw.zscore(subject.seen_key(flow.id), op_id) is not None
    subject.lengthen(flow.id, 10_500)
    before = flows.get(flow.id), subject.raw.xlen(subject.events_key(flow.id))
    with subject.rival() as rival, sent_by(rival) as packets:
        for ref in (flow,) if name in ALWAYS_A_COPY else (flow, flow.id):
            assert CHANGES[name](flows, ref, op_id=op_id) == first
            packets.clear()
            assert CHANGES[name](rival, ref, op_id=op_id) == first
            assert attempts(packets) == 1
    assert (flows.get(flow.id), subject.raw.xlen(subject.events_key(flow.id))) == before
    assert subject.fence_of(flow.id) == b""


def test_a_mutation_under_a_brought_id_is_known_as_well(flows: Any, subject: Subject) -> None:
    """Though it reads the flow anew."""
    flow, op_id = flow_in(flows, "running"), brought_id()
    first = CHANGES["mutate"](flows, flow.id, op_id=op_id)
    subject.lengthen(flow.id, 10_500)
    assert CHANGES["mutate"](flows, flow.id, op_id=op_id) == first
    assert flows.get(flow.id).revision == 2


def test_only_ids_that_callers_bring_are_in_the_index(flows: Any, subject: Subject) -> None:
    """Scored with the milliseconds of their events; an id of the library's enters when a caller brings it."""
    flow = flow_in(flows, "running")
    flow = flows.update_state(flow, {"x": 1})
    flows.append_event(flow, "note")
    flows.record_step_observation(observed(flow.id))
    assert subject.raw.exists(subject.seen_key(flow.id)) == 0
    brought = [brought_id(), drawn_id(), brought_id()]
    flows.update_state(flow.id, {"x": 2}, op_id=brought[0])
    flows.append_event(flow, "note", op_id=brought[1])
    flows.record_step_observation(observed(flow.id), op_id=brought[2])
    expected: dict[Any, float] = {
        event.op_id.encode(): float(event.id.partition("-")[0])
        for event in flows.iter_events(flow)
        if event.op_id in brought
    }
    found: Any = subject.raw.zrange(subject.seen_key(flow.id), 0, -1, withscores=True)
    assert dict(found) == expected
    assert len(expected) == 3


def test_the_index_is_trimmed_past_an_hour_and_not_before(subject: Subject) -> None:
    """With `event_maxlen`: down to that many, but no id of the last hour; without it, never."""
    flows, unbounded = subject.manager(event_maxlen=100), subject.manager()
    flow = flow_in(flows, "running")
    key = subject.seen_key(flow.id)
    ops = [brought_id() for _ in range(160)]
    for op_id in ops:
        flows.append_event(flow.id, "note", op_id=op_id)
    assert subject.raw.zcard(key) == 160, "all of them are of the last hour"
    now: Any = subject.raw.time()
    now_ms = now[0] * 1000
    past, nearly = ops[:30], ops[30:60]
    subject.raw.zadd(key, {op_id: now_ms - 3_660_000 + n for n, op_id in enumerate(past)})
    subject.raw.zadd(key, {op_id: now_ms - 3_540_000 + n for n, op_id in enumerate(nearly)})
    unbounded.append_event(flow.id, "note", op_id=brought_id())
    assert subject.raw.zcard(key) == 161
    sizes = []
    for _ in range(40):
        flows.append_event(flow.id, "note", op_id=brought_id())
        sizes.append(subject.raw.zcard(key))
    members: Any = subject.raw.zrange(key, 0, -1)
    left = {member.decode() for member in members}
    assert left.isdisjoint(past)
    assert left.issuperset(ops[30:])
    assert min(sizes) < 161, "an index that has grown shrinks again"
    assert sizes[-1] == 130 + 1 + 40


def test_the_index_of_few_ids_keeps_old_ones(subject: Subject) -> None:
    """It is trimmed where it is longer than the trail may be."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    first = brought_id()
    flows.append_event(flow.id, "note", op_id=first)
    subject.raw.zadd(subject.seen_key(flow.id), {first: 1})
    for _ in range(99):
        flows.append_event(flow.id, "note", op_id=brought_id())
    assert subject.raw.zscore(subject.seen_key(flow.id), first) == 1
    flows.append_event(flow.id, "note", op_id=brought_id())
    assert subject.raw.zscore(subject.seen_key(flow.id), first) is None


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "mutate"])
def test_a_brought_id_is_known_without_its_event(flows: Any, subject: Subject, name: str) -> None:
    """Of a trimmed trail: nothing is applied again. An audit entry cannot be returned: `OutcomeUnknown`."""
    flow, op_id = flow_in(flows, source_of(name)), brought_id()
    first = CHANGES[name](flows, flow, op_id=op_id)
    subject.lengthen(flow.id, 5)
    subject.trim(flow.id, 2)
    before = subject.unfenced()
    for ref in (flow,) if name in ALWAYS_A_COPY else (flow, flow.id):
        if name == "append_event":
            with pytest.raises(OutcomeUnknown) as unknown:
                CHANGES[name](flows, ref, op_id=op_id)
            assert unknown.value.op_id == op_id
        elif name == "update_and_append":
            assert CHANGES[name](flows, ref, op_id=op_id)[0] == first[0]
        else:
            assert CHANGES[name](flows, ref, op_id=op_id) == first
    assert subject.unfenced() == before


def test_a_brought_id_may_not_be_used_for_something_else(flows: Any, subject: Subject) -> None:
    """`InvalidData`, and nothing but the fence changes."""
    flow, op_id = flow_in(flows, "running"), brought_id()
    flows.append_event(flow, "note", op_id=op_id)
    before = subject.unfenced()
    with pytest.raises(InvalidData, match="used before"):
        flows.append_event(flow, "another", op_id=op_id)
    with pytest.raises(InvalidData, match="used before"):
        flows.finish(flow, op_id=op_id)
    with pytest.raises(InvalidData, match="used before"):
        flows.record_step_observation(observed(flow.id), op_id=op_id)
    assert subject.unfenced() == before


def test_a_flow_takes_its_index_with_it(flows: Any, subject: Subject) -> None:
    """Deleted and created anew, the new flow knows no id that was brought to the first."""
    first, op_id = flow_in(flows, "running"), brought_id()
    flows.update_state(first, increment={"processed": 1}, op_id=op_id)
    assert flows.delete(first)
    assert subject.only_tombstones_of(first.id)
    anew = flow_in(flows, "running", flow_id=first.id)
    after = flows.update_state(anew, increment={"processed": 1}, op_id=op_id)
    assert (after.revision, after.state["processed"]) == (2, 1)
