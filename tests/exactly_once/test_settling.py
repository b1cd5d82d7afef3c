"""An unknown outcome: when it is one, and how its op id settles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from redisflow import AsyncFlowManager, Flow, FlowManager, FlowStatus, OutcomeUnknown, StorageError
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, PASS, Fault, FaultProxy, delay
from tests.support.resends import IDENTITY, VERBS, prepared, sent
from tests.support.servers import Server
from tests.support.waiting import wait_until


def gone_after(fault: Fault) -> Callable[[list[bytes]], Fault]:
    """Give the fault to the first script; nothing gets through from then on."""
    gone = False

    def plan(command: list[bytes]) -> Fault:
        nonlocal gone
        if gone:
            return CUT_REQUEST
        gone = sent(command) is not None
        return fault if gone else PASS

    return plan


@pytest.mark.parametrize("fault", [CUT_REPLY, CUT_REQUEST], ids=["applied", "not-applied"])
@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("bound", [False, True], ids=["of-all", "of-one-owner"])
def test_the_op_id_of_an_unknown_outcome_settles_it(
    proxy: FaultProxy, direct: FlowManager, prefix: str, *, name: str, fault: Fault, bound: bool
) -> None:
    """Applied already, the same verb with that op id answers; not applied, it is applied once. By a view as well."""
    if bound:
        direct = direct.for_owner("o")
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    before = len(direct.list_events(flow))
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(fault)
        with pytest.raises(OutcomeUnknown) as unknown:
            verb(flows.for_owner("o") if bound else flows, flow, None)
    op_id = unknown.value.op_id
    assert isinstance(unknown.value, StorageError)
    assert unknown.value.__cause__ is not None
    applied = len(direct.list_events(flow)) - before
    assert applied == (fault is CUT_REPLY)
    if applied:
        direct.append_event(flow, "aside")
        if kind not in {"finished", "failed", "cancelled", "cancel_requested"}:
            direct.update_state(flow, increment={"aside": 1})
    answer = verb(direct, flow, op_id)
    assert answer is not None
    answer = verb(direct, flow, op_id)
    assert answer is not None
    trail = direct.list_events(flow)
    assert [event.kind for event in trail if event.op_id == op_id] == [kind]
    if isinstance(answer, Flow):
        assert answer == direct.get(flow)
    if name == "update_state":
        assert answer.state["n"] == 5


@pytest.mark.parametrize("fault", [CUT_REPLY, CUT_REQUEST], ids=["applied", "not-applied"])
@pytest.mark.parametrize("method", ["create_managed", "create_mirrored"])
@pytest.mark.parametrize("chosen", [True, False], ids=["id-chosen", "id-not-chosen"])
def test_the_op_id_of_an_unknown_creation_settles_it(
    proxy: FaultProxy, direct: FlowManager, prefix: str, *, method: str, fault: Fault, chosen: bool
) -> None:
    """Whoever chose the flow's id, there is one flow in the end, with one trail."""
    options: dict[str, Any] = {**IDENTITY, "flow_id": uuid4() if chosen else None}
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(fault)
        with pytest.raises(OutcomeUnknown) as unknown:
            getattr(flows, method)(**options)
    flow = getattr(direct, method)(**options, op_id=unknown.value.op_id)
    assert [found.id for found in direct.list_by_owner("o")] == [flow.id]
    assert [event.revision for event in direct.iter_events(flow)] == list(range(flow.revision + 1))


async def test_asyncio_names_an_unknown_outcome_as_well(proxy: FaultProxy, direct: FlowManager, prefix: str) -> None:
    """`OutcomeUnknown` carries the op id, which settles it from another manager."""
    flow = prepared(direct, FlowStatus.RUNNING)
    async with AsyncFlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(CUT_REPLY)
        with pytest.raises(OutcomeUnknown) as unknown:
            await flows.update_state(flow, increment={"n": 1})
    assert direct.update_state(flow, increment={"n": 1}, op_id=unknown.value.op_id).state["n"] == 1


def test_a_server_that_was_never_reached_is_no_unknown_outcome(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """What was surely not sent was surely not applied: a plain `StorageError`."""
    flow = prepared(direct, FlowStatus.RUNNING)
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = lambda _: CUT_REQUEST
        flows.close()
        with pytest.raises(StorageError) as failure:
            flows.start_running(flow)
    assert not isinstance(failure.value, OutcomeUnknown)
    assert direct.get(flow) == flow


@pytest.mark.parametrize("owner", ["o", "another"])
@pytest.mark.parametrize("bound", [False, True], ids=["of-all", "of-one-owner"])
def test_a_resent_delete_spares_the_flow_that_was_created_anew(
    proxy: FaultProxy, direct: FlowManager, prefix: str, *, owner: str, bound: bool
) -> None:
    """The first attempt deleted one flow; another of the same id is not this operation's to delete."""
    flow = prepared(direct, FlowStatus.RUNNING)

    def plan(command: list[bytes]) -> Fault:
        call = sent(command)
        if call and call[2]:
            direct.create_managed(**IDENTITY | {"owner_session_key": owner}, flow_id=flow.id, exist_ok=True)
        return CUT_REPLY if call and not call[2] else PASS

    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = plan
        assert (flows.for_owner("o") if bound else flows).delete(flow) is True
    assert direct.get(flow) is not None


@pytest.mark.parametrize("moved_on", [False, True])
def test_a_first_attempt_that_arrives_after_its_resend_is_not_applied_again(
    server: Server, proxy: FaultProxy, direct: FlowManager, prefix: str, moved_on: bool
) -> None:
    """A packet held up on the way while its resend got through finds its connection closed."""
    flow = prepared(direct, FlowStatus.RUNNING)
    late: list[list[bytes]] = []

    def plan(command: list[bytes]) -> Fault:
        if sent(command) and not late:
            late.append(command)
            return delay(0.6)
        return PASS

    with FlowManager.from_url(f"{proxy.url}?socket_timeout=0.2", prefix=prefix) as flows:
        proxy.plan = plan
        flows.update_state(flow, increment={"n": 1})
        assert late
        if moved_on:
            direct.update_state(flow, increment={"aside": 1})
    wait_until(lambda: not proxy._links, description="the packet held up to arrive, or its connection to be closed")
    after = direct.get(flow)
    assert after is not None
    assert after.state["n"] == 1
