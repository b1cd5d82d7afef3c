"""Hostile names and values through a real server: what is taken reads back equal, what is refused wrote nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redisflow import ExternalEvent, FlowError, InvalidData, StepObservation
from tests.fuzz.calls import CALLS
from tests.fuzz.draw import Draw
from tests.fuzz.storable import Unstorable, stored_form
from tests.support.model import exact
from tests.support.subjects import WHO, create, flow_in

if TYPE_CHECKING:
    from tests.support.subjects import Subject

FEW = settings(
    max_examples=60,
    deadline=timedelta(seconds=20),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
names = st.one_of(
    st.text(max_size=12),
    st.text(st.sampled_from("{}:|*?[]\0\n\r\t \\\"'"), max_size=8),
    st.text(max_size=8).map(lambda text: text * 200),
    st.sampled_from(["{}", "}{", "{x}", "\ud800", "a\udfff", "é" * 512, "x" * 1025, "", "\u202e", "\x1b[31m"]),
    st.sampled_from([None, 7, b"name", ["x"], 10**5000]),
)
NAMED = ["controller_id", "owner_session_key", "requester_origin", "current_step"]
drawn = st.binary(max_size=200).map(Draw)


def is_name(name: Any, *, nul: bool = True) -> bool:
    """Text of 1 to 1,024 bytes."""
    if not isinstance(name, str) or ("\0" in name and not nul):
        return False
    try:
        return 1 <= len(name.encode()) <= 1024
    except UnicodeEncodeError:
        return False


def accepted(subject: Subject, call: Callable[[], Any], *, allowed: bool) -> Any:
    """What a call returns that is allowed; one that is not is refused, and has written nothing."""
    before = None if allowed else subject.snapshot()
    try:
        result = call()
    except InvalidData:
        assert not allowed
        assert subject.snapshot() == before
        return None
    assert allowed
    return result


@FEW
@given(st.lists(names, min_size=4, max_size=4))
def test_a_name_is_taken_and_found_again_or_refused(real_subject: Subject, four: list[Any]) -> None:
    """Of a flow, and in its owner's listing, which is a key of that name."""
    flows = real_subject.manager()
    identity = dict(zip(NAMED, four, strict=True))
    allowed = all(map(is_name, four))
    flow = accepted(real_subject, lambda: flows.create_managed(**WHO | identity), allowed=allowed)
    if flow is not None:
        assert flows.get(flow.id) == flow
        assert {field: getattr(flow, field) for field in identity} == identity
        assert flow in flows.list_by_owner(identity["owner_session_key"])
        assert flows.for_owner(identity["owner_session_key"]).get(flow.id) == flow
        assert flows.delete(flow)
        assert real_subject.only_tombstones_of(flow.id)
        real_subject.raw.delete(real_subject.flow_key(flow.id))


@FEW
@given(names, names, names)
def test_what_a_record_is_called_is_taken_and_found_again_or_refused(
    real_subject: Subject, kind: Any, run_id: Any, child: Any
) -> None:
    """Kinds of events, runs, steps."""
    flows = real_subject.manager()
    flow = create(flows)
    event = accepted(real_subject, lambda: flows.append_event(flow, kind), allowed=is_name(kind))
    assert event is None or flows.list_events(flow, 1) == [event]
    observation = StepObservation(flow, run_id, "task", "running", child)
    allowed = is_name(run_id) and (child is None or is_name(child))
    step = accepted(real_subject, lambda: flows.record_step_observation(observation), allowed=allowed)
    if step is not None:
        assert (step.run_id, step.child_session_key) == (run_id, child)
        assert flows.find_step_by_run_id(flow, run_id) == step
        assert flows.list_steps(flow) == [step]
    stepped = accepted(
        real_subject, lambda: flows.update_state(flow, next_step=run_id), allowed=run_id is None or is_name(run_id)
    )
    assert stepped is None or flows.get(flow.id) == stepped
    flows.delete(flow)


@FEW
@given(names, names)
def test_an_event_of_any_name_finds_just_its_waiter(real_subject: Subject, topic: Any, correlation_id: Any) -> None:
    """The names make one entry of the index, and cannot be taken for other ones."""
    flows = real_subject.manager()
    engine = real_subject.engine(flows)
    running = flow_in(flows, "running")
    other = flow_in(flows, "waiting", wait=ExternalEvent("t", "c"))
    allowed = is_name(topic, nul=False) and is_name(correlation_id, nul=False)
    wire = {"kind": "external_event", "topic": topic, "correlation_id": correlation_id}
    waiting = accepted(real_subject, lambda: flows.set_waiting(running, wire), allowed=allowed)
    if waiting is not None and (topic, correlation_id) != ("t", "c"):
        assert flows.get(waiting.id) == waiting
        assert [flow.id for flow in engine.resume_waiters(topic, correlation_id)] == [waiting.id]
    flows.delete(running)
    flows.delete(other)


@FEW
@given(drawn)
def test_a_value_is_taken_and_read_back_equal_or_refused(real_subject: Subject, draw: Draw) -> None:
    """As a state, a patch, a payload and a result, as docs/concepts.md says."""
    flows = real_subject.manager()
    value = draw.value()
    try:
        expected = stored_form(value)
        allowed = True
    except Unstorable:
        expected, allowed = None, False
    empty = {} if expected is None else expected
    flow = accepted(real_subject, lambda: flows.create_managed(**WHO, state=value), allowed=allowed) or create(flows)
    assert not allowed or exact(flows.get(flow.id).state) == exact(flow.state) == exact(empty)
    event = accepted(real_subject, lambda: flows.append_event(flow, "note", value), allowed=allowed)
    assert event is None or exact(flows.list_events(flow, 1)[0].payload) == exact(event.payload) == exact(empty)
    observation = StepObservation(flow, "run", "task", "running", result=value)
    step = accepted(real_subject, lambda: flows.record_step_observation(observation), allowed=allowed)
    assert step is None or exact(flows.list_steps(flow)[0].result) == exact(step.result) == exact(expected)
    if not isinstance(expected, dict) and expected is not None:
        changed = accepted(real_subject, lambda: flows.update_state(flow, value), allowed=allowed)
        assert changed is None or exact(flows.get(flow.id).state) == exact(expected)
    flows.delete(flow)


@settings(FEW, max_examples=150)
@given(st.sampled_from(sorted(CALLS)), drawn)
def test_any_call_is_carried_out_or_refused_with_nothing_written(real_subject: Subject, name: str, draw: Draw) -> None:
    """Whatever it is passed; and what it leaves can be read, all of it. A settlement writes a fence."""
    if name in {"run", "watch", "manager", "settings", "tick", "try_resume", "resume_waiters"}:
        return  # made of a manager, which the other shell is not
    flows = real_subject.manager()
    held = flows.create_mirrored(**WHO, flow_id=UUID(int=7), exist_ok=True)
    before = real_subject.unfenced()
    refused = True
    with suppress(FlowError, TimeoutError):
        CALLS[name](draw, flows, held)
        refused = False
    assert not refused or real_subject.unfenced() == before
    diagnosis = flows.doctor()
    assert [finding for finding in diagnosis.findings if finding.flow_id or finding.key] == []
    for status in ("created", "running", "waiting", "finished", "failed", "cancelled"):
        for flow in flows.list_by_status(status):
            assert attrs.asdict(flow, recurse=False)
            assert list(flows.iter_events(flow))
            flows.list_steps(flow)
            flows.delete(flow)
