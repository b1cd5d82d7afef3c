"""The proxy that holds packets back, and a suite that notices what late packets and forgotten scripts can do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from random import Random
from uuid import uuid4

import attrs
import pytest

from redisflow import Flow, FlowManager, FlowStatus, delivery
from redisflow.calls import Call
from redisflow.scripts import UNTRIMMED, Appending, Source, TransitionScript
from tests.chaos.findings import Breach, Damage
from tests.chaos.suite import run
from tests.support.proxy import FaultProxy, late
from tests.support.resends import prepared
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture
def direct(server: Server) -> Iterator[FlowManager]:
    """A manager that goes around the proxy."""
    with FlowManager.from_url(server.url, prefix=f"t{uuid4().hex}") as flows:
        yield flows


def called(proxy: FaultProxy, direct: FlowManager, flow: Flow) -> Flow:
    """Change a flow through the proxy."""
    url = f"{proxy.url}?socket_timeout=0.2"
    with FlowManager.from_url(url, prefix=direct.namespace.prefix) as flows:
        flows.get(flow)
        return flows.update_state(flow, increment={"n": 1})


@pytest.mark.parametrize("cut", [False, True], ids=["unanswered", "cut"])
def test_a_command_that_is_held_back_arrives_at_the_end(server: Server, direct: FlowManager, *, cut: bool) -> None:
    """Its client is long gone; the server still gets it over the same connection, and refuses it."""
    flow = prepared(direct, FlowStatus.RUNNING)
    with FaultProxy(server.port) as proxy:
        proxy.inject(late(cut=cut), "EVALSHA")
        assert called(proxy, direct, flow).state["n"] == 1
        proxy.sever()
        assert (proxy.held, proxy.delivered) == (1, 0)
        calls = server.raw.info("commandstats")["cmdstat_evalsha"]["calls"]
        proxy.deliver()
        assert (proxy.held, proxy.delivered) == (0, 1)
        assert server.raw.info("commandstats")["cmdstat_evalsha"]["calls"] == calls + 1
    assert [event.kind for event in direct.iter_events(flow)].count("state_updated") == 1


def test_a_command_that_is_held_back_arrives_after_its_time(server: Server, direct: FlowManager) -> None:
    """Nobody has to ask for it."""
    flow = prepared(direct, FlowStatus.RUNNING)
    with FaultProxy(server.port) as proxy:
        proxy.inject(late(0.5), "EVALSHA")
        began_s = time.monotonic()
        assert called(proxy, direct, flow).state["n"] == 1
        wait_until(lambda: proxy.delivered, description="the command arrives")
        assert time.monotonic() - began_s >= 0.5
        assert proxy.held == 0


def test_a_client_that_waits_is_answered_late(server: Server, direct: FlowManager) -> None:
    """What is held back for less than the client waits is a delay."""
    flow = prepared(direct, FlowStatus.RUNNING)
    with FaultProxy(server.port) as proxy, FlowManager.from_url(proxy.url, prefix=direct.namespace.prefix) as flows:
        flow = flows.update_state(flow, increment={"n": 1})  # the server knows the script by now
        proxy.inject(late(0.1), "EVALSHA")
        assert flows.update_state(flow, increment={"n": 1}).state["n"] == 2
        assert (proxy.connections, proxy.faults["late"]) == (1, 1)


def unfenced(engine_text: str) -> str:
    """A script with the guard left out that refuses attempts with another fence."""
    text, found = re.subn(r"if attempt ~= fence and not is_found then", "if false then", engine_text)
    assert found == 1
    return text


def without_fences() -> Appending:
    """The library's scripts for changes, without fences."""

    def altered(transition: TransitionScript) -> TransitionScript:
        source = Source.of(unfenced(transition.script.source.text.decode()))
        return attrs.evolve(transition, script=attrs.evolve(transition.script, source=source))

    transitions = {key: altered(transition) for key, transition in UNTRIMMED.transitions.items()}
    return attrs.evolve(UNTRIMMED, transitions=transitions)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["late", "reborn", "handover"])
def test_the_suite_notices_scripts_without_fences(name: str) -> None:
    """Late packets are then applied: twice, or after a refusal."""
    verdict = run(name, "sync", ENGINES[0], seconds=4.0, seed=Random(name).randrange(10**6), appending=without_fences())
    assert verdict.late > 0
    assert verdict.found(Damage.OP_TWICE, Breach.REFUSED, Breach.LATE) + len(verdict.violations) > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_suite_notices_batches_that_are_sent_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server has no script for is then carried out after what was queued after it."""

    def at_once(calls: Sequence[Call]) -> Iterator[Sequence[int]]:
        yield range(len(calls))

    monkeypatch.setattr(delivery, "_rounds", at_once)
    verdict = run("batches", "sync", ENGINES[0], seconds=4.0, seed=1)
    assert verdict.found(Breach.ORDER) > 0
