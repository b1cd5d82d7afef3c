"""A reply is lost, and then the server's memory is full: what was applied is answered all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redisflow import FlowManager, FlowStatus, StorageError
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, PASS, Fault, FaultProxy
from tests.support.resends import IDENTITY, VERBS, prepared, sent
from tests.support.servers import ENGINES, Server


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def small(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server whose memory the tests fill."""
    with Server(request.param) as server:
        yield server


class Filling:
    """A plan: the first attempt meets with a fault, and before anything else arrives the memory is full."""

    def __init__(self, server: Server, fault: Fault) -> None:
        self._server, self._fault = server, fault
        self.is_full = False

    def __call__(self, command: list[bytes]) -> Fault:
        if sent(command) and not self.is_full:
            self.is_full = True
            return self._fault
        if self.is_full:
            self._server.client().config_set("maxmemory", "1mb")
        return PASS


@pytest.mark.parametrize("name", ["start_running", "set_waiting", "update_state", "append_event", "finish"])
def test_what_was_applied_is_answered(small: Server, name: str) -> None:
    """The search finds it, and a script that only reads answers."""
    small.client().config_set("maxmemory", "0")
    status, kind, verb = VERBS[name]
    with FlowManager.from_url(small.url) as direct, FaultProxy(small.port) as proxy:
        flow = prepared(direct, status)
        verb(direct, prepared(direct, status), None)  # the server has the script: what is lost is its reply
        with FlowManager.from_url(proxy.url) as flows:
            flows.connect()
            proxy.plan = Filling(small, CUT_REPLY)
            assert verb(flows, flow, None) is not None
        small.client().config_set("maxmemory", "0")
        assert [event.kind for event in direct.iter_events(flow)].count(kind) == 1


def test_what_was_not_applied_is_refused_and_known_to_be(small: Server) -> None:
    """No `OutcomeUnknown`: the attempt is fenced off, and nothing was changed."""
    small.client().config_set("maxmemory", "0")
    with FlowManager.from_url(small.url) as direct, FaultProxy(small.port) as proxy:
        flow = prepared(direct, FlowStatus.RUNNING)
        with FlowManager.from_url(proxy.url) as flows:
            flows.connect()
            proxy.plan = Filling(small, CUT_REQUEST)
            with pytest.raises(StorageError) as refused:
                flows.update_state(flow, increment={"n": 1})
        assert type(refused.value) is StorageError
        assert refused.value.code == "OOM"
        small.client().config_set("maxmemory", "0")
        assert direct.get(flow) == flow
        assert direct.create_managed(**IDENTITY).status is FlowStatus.CREATED
