"""One transition table: all 36 pairs, asked of Python and of the server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from redisflow import AlreadyTerminal, Flow, FlowError, FlowStatus, IllegalTransition, Manual
from tests.support.subjects import flow_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.subjects import Subject

# As the design has it, written out: neither Python's table nor the scripts' copy of it.
TABLE = {
    "created": {"running", "cancelled"},
    "running": {"waiting", "finished", "failed", "cancelled"},
    "waiting": {"running", "failed", "cancelled"},
    "finished": set(),
    "failed": set(),
    "cancelled": set(),
}
PAIRS = [(source, target) for source in FlowStatus for target in FlowStatus]

VERBS_TO: dict[str, list[Callable[[Any, Flow], Flow]]] = {
    "created": [],
    "running": [lambda flows, flow: flows.start_running(flow), lambda flows, flow: flows.resume(flow)],
    "waiting": [lambda flows, flow: flows.set_waiting(flow, Manual())],
    "finished": [lambda flows, flow: flows.finish(flow)],
    "failed": [lambda flows, flow: flows.fail(flow, "broken")],
    "cancelled": [lambda flows, flow: flows.cancel(flow)],
}


def test_there_are_six_statuses_and_three_are_terminal() -> None:
    """The lifecycle's statuses, by name and order."""
    assert [status.value for status in FlowStatus] == list(TABLE)
    assert [status for status in FlowStatus if status.is_terminal] == ["finished", "failed", "cancelled"]
    assert len(PAIRS) == 36


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_python_has_the_designs_table(source: FlowStatus, target: FlowStatus) -> None:
    """`can_transition_to` and `targets` say what the design's table says."""
    assert source.can_transition_to(target) == (target in TABLE[source]) == (target in source.targets)


def outcome(call: Callable[[], Flow]) -> FlowStatus | FlowError:
    """The status a call leads to, or its refusal."""
    try:
        return call().status
    except FlowError as error:
        return error


def check(flows: Any, flow: Flow, target: FlowStatus, call: Callable[[], Flow], *, allowed: bool) -> None:
    """Compare what the server does with what was expected of it."""
    found = outcome(call)
    if allowed:
        assert found == target
        assert flows.get(flow.id).status is target
    elif flow.status.is_terminal:
        assert isinstance(found, AlreadyTerminal)
        assert found.status is flow.status
    else:
        assert isinstance(found, IllegalTransition)
        assert (found.source, found.target) == (flow.status, target)
    if not allowed:
        assert flows.get(flow.id) == flow


@pytest.mark.parametrize("source", FlowStatus)
def test_the_verbs_follow_the_table(flows: Any, subject: Subject, source: FlowStatus) -> None:
    """Every verb from every status: just the pairs of the table go through."""
    for target in FlowStatus:
        for verb in VERBS_TO[target]:
            flow = flow_in(flows, source)
            allowed = source.can_transition_to(target)
            check(flows, flow, target, partial(verb, flows, flow), allowed=allowed)


def move(flows: Any, wanted: Flow) -> Flow:
    """Store a flow by the primitive."""
    flow: Flow = flows.update_and_append(wanted, "moved")[0]
    return flow


@pytest.mark.parametrize("source", FlowStatus)
def test_the_primitive_follows_the_table(flows: Any, subject: Subject, source: FlowStatus) -> None:
    """`update_and_append` from every status to every other: the same pairs. To the same, if live, it is no step."""
    for target in FlowStatus:
        flow = flow_in(flows, source)
        wanted = attrs.evolve(flow, status=target, wait={"kind": "manual"})
        allowed = source.can_transition_to(target) or (source is target and not source.is_terminal)
        check(flows, flow, target, partial(move, flows, wanted), allowed=allowed)
