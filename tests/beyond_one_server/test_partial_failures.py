"""Calls about many flows whose replicas are away: each flow is reported."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from redisflow import AsyncWaitEngine, ExternalEvent, NewFlow, NotDurable, PartialFailure, WaitEngine
from tests.beyond_one_server.conftest import Open
from tests.beyond_one_server.test_replicas import SOON_S, Group, grouped
from tests.support.servers import ENGINES
from tests.support.subjects import WHO, Blocking, LoopThread, flow_in


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """A primary with two replicas, one of which has fallen silent."""
    with ExitStack() as stack:
        group = grouped(stack, ENGINES[0])
        group.replicas[0].pause()
        stack.callback(group.replicas[0].resume)
        yield group


@pytest.fixture
def flows(open_url: Open, group: Group) -> Any:
    """A manager whose changes wait for both."""
    return open_url(group.primary.url, durability="replicas:2", confirm_within_s=SOON_S)


def engine_of(flows: Any, loop_thread: LoopThread) -> Any:
    """Make an engine of a manager of either shell."""
    if isinstance(flows, Blocking):
        return Blocking(AsyncWaitEngine(flows.target), loop_thread)
    return WaitEngine(flows)


def test_every_flow_that_was_created_is_named(flows: Any) -> None:
    """Each with an error of its own, and the operation id by which a single creation waits once more."""
    inputs = [NewFlow(**WHO, state={"n": n}) for n in range(3)]
    with pytest.raises(PartialFailure) as raised:
        flows.create_many(inputs)
    assert (raised.value.count, raised.value.done) == (0, [])
    assert [failure.place for failure in raised.value.failed] == [0, 1, 2]
    for failure in raised.value.failed:
        assert isinstance(failure.error, NotDurable)
        assert failure.error.flow == flows.get(failure.flow_id)
        again = flows.with_durability("local").create_managed(
            **WHO, state={"n": failure.place}, op_id=failure.error.op_id
        )
        assert again == failure.error.flow


def test_every_flow_that_was_resumed_is_named(flows: Any, loop_thread: LoopThread) -> None:
    """Each once, as it is now, and settled by its operation id."""
    local = flows.with_durability("local")
    waiting = [flow_in(local, "waiting", wait=ExternalEvent("approvals", "41")) for _ in range(5)]
    with pytest.raises(PartialFailure) as raised:
        engine_of(flows, loop_thread).resume_waiters("approvals", "41", {"ok": True})
    assert {failure.flow_id for failure in raised.value.failed} == {flow.id for flow in waiting}
    for failure in raised.value.failed:
        assert isinstance(failure.error, NotDurable)
        assert failure.error.flow == local.get(failure.flow_id)
        assert failure.error.flow is not None
        assert failure.error.flow.state["resume_event"] == {"ok": True}
        settled = engine_of(local, loop_thread).try_resume_external(
            failure.flow_id, "approvals", "41", {"ok": True}, op_id=failure.error.op_id
        )
        assert settled == failure.error.flow


def test_pruning_waits_for_nobody(flows: Any) -> None:
    """What is lost in a failover, the next pruning deletes again."""
    local = flows.with_durability("local")
    for _ in range(3):
        local.cancel(local.create_managed(**WHO))
    assert flows.prune_terminal_flows(dt.timedelta(0)) >= 3
