"""What real writers behind a proxy that loses replies were answered by a real server, and by one with seeded bugs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import Flow, FlowError, FlowEvent, FlowManager, OutcomeUnknown, StorageError
from redisflow.scripts import UNTRIMMED, Appending, Source, TransitionScript
from tests.chaos.auditor import audit
from tests.chaos.findings import Acknowledged, Damage, Finding
from tests.chaos.history import UNKNOWN, Operation, Outcome, check
from tests.chaos.simulated import Choose, any_call, any_update
from tests.chaos.specification import CREATIONS, Noted, Refusal, Version
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, PASS, Fault, FaultProxy
from tests.support.resends import IDENTITY, sent
from tests.support.servers import ENGINES, Server

WRITERS, CALLS = 8, 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


class Faults:
    """Loses one reply in seven and one request in thirty; and all replies, or all requests, of a few operations."""

    def __init__(self) -> None:
        self._chance = Random(3)
        self._ops: set[bytes] = set()
        self._doomed: dict[bytes, Fault] = {}

    def __call__(self, command: list[bytes]) -> Fault:
        """Say what becomes of a command."""
        if (call := sent(command)) is None:
            return PASS
        op = call[1]
        if op not in self._ops:
            self._ops.add(op)
            if len(self._ops) % 100 == 50:
                self._doomed[op] = self._chance.choice([CUT_REPLY, CUT_REQUEST])
        return self._doomed.get(op) or self._chance.choices([PASS, CUT_REPLY, CUT_REQUEST], [25, 4, 1])[0]


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy before the server, with faults."""
    with FaultProxy(server.port, Faults()) as proxy:
        yield proxy


class Recorder:
    """Calls one flow, and notes what was asked and answered, and when, and which changes were acknowledged."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        self.history: list[Operation] = []
        self.acknowledged: list[Acknowledged] = []

    def call(self, flows: FlowManager, process: int, verb: str, arguments: dict[str, Any], ref: Any) -> Flow | None:
        """Call a verb; return the flow, where it answered with one."""
        outcome: Outcome
        answer, invoked_s = None, time.monotonic()
        try:
            if verb in CREATIONS:
                answer = getattr(flows, verb)(**IDENTITY, flow_id=self.flow_id, **arguments)
            else:
                answer = getattr(flows, verb)(ref, **arguments)
        except OutcomeUnknown:
            outcome = UNKNOWN
        except StorageError:
            return None  # it was not carried out
        except FlowError as error:
            outcome = Refusal.of(error)
        else:
            outcome = Noted(answer.revision) if verb == "append_event" else answer and Version.of(answer)
        self.history.append(Operation(process, verb, arguments, invoked_s, time.monotonic(), outcome))
        if isinstance(answer, FlowEvent):
            self.acknowledged.append(Acknowledged(self.flow_id, answer.op_id, answer.revision, answer.kind))
        if not isinstance(answer, Flow):
            return None
        self.acknowledged.append(Acknowledged(self.flow_id, answer.etag, answer.revision))
        return answer


def write(recorder: Recorder, flows: FlowManager, process: int, choose: Choose) -> None:
    """Call again and again, by the copy held or by the id."""
    chance, held = Random(process), None
    if process == 0:
        held = recorder.call(flows, process, "create_mirrored", {"state": {"n": 0}}, None)
    for _ in range(CALLS):
        verb, arguments = choose(chance, held.revision if held else 0)
        ref = held if held and chance.random() < 0.7 else recorder.flow_id
        held = recorder.call(flows, process, verb, arguments, ref) or held


@attrs.frozen
class Run:
    """What the writers were answered, by flow, and what an audit found afterwards."""

    histories: list[list[Operation]]
    findings: list[Finding]


def run(server: Server, proxy: FaultProxy, appending: Appending = UNTRIMMED) -> Run:
    """Let writers loose on one flow after the other, by such scripts; the last to look is not disturbed."""
    prefix, recorders = f"t{uuid4().hex}", []
    with ExitStack() as stack:
        direct = stack.enter_context(FlowManager.from_url(server.url, prefix=prefix))
        writers = [
            # A deadline that is soon over: an operation whose replies are all lost is then unknown.
            stack.enter_context(FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=1.0))
            for _ in range(WRITERS)
        ]
        for flows in writers:
            flows.namespace.appending = appending
        pool = stack.enter_context(ThreadPoolExecutor(WRITERS))
        for choose in (any_call, any_update, any_call, any_update):
            recorder = Recorder(uuid4())
            recorders.append(recorder)
            jobs = [pool.submit(write, recorder, flows, n, choose) for n, flows in enumerate(writers)]
            for job in jobs:
                job.result(timeout=60)
            recorder.call(direct, WRITERS, "get", {}, recorder.flow_id)
    acknowledged = [change for recorder in recorders for change in recorder.acknowledged]
    findings = audit([server.client()], prefix, acknowledged)
    return Run([recorder.history for recorder in recorders], findings)


def test_what_real_writers_were_answered_is_linearizable(server: Server, proxy: FaultProxy) -> None:
    """Replies lost, resends answered late, outcomes unknown: each flow changed as if by one call after the other."""
    done = run(server, proxy)
    assert [str(check(history)) for history in done.histories] == ["None"] * len(done.histories)
    assert done.findings == []
    operations = [operation for history in done.histories for operation in history]
    assert proxy.faults["cut_reply"] > 50
    assert proxy.faults["cut_request"] > 5
    assert any(not operation.is_answered for operation in operations)
    refused = {operation.outcome.name for operation in operations if isinstance(operation.outcome, Refusal)}
    assert {"RevisionMismatch", "IllegalTransition"} <= refused


def without(guard: str) -> Appending:
    """The scripts of all verbs with one `if` of lua/transition.lua never taken."""

    def altered(transition: TransitionScript) -> TransitionScript:
        sources = []
        for source in (transition.script.source, transition.script.plain):
            text, found = re.subn(guard, "if false then", source.text.decode())
            assert found == 1
            sources.append(Source.of(text))
        script = attrs.evolve(transition.script, source=sources[0], plain=sources[1])
        return attrs.evolve(transition, script=script)

    transitions = {key: altered(transition) for key, transition in UNTRIMMED.transitions.items()}
    return attrs.evolve(UNTRIMMED, transitions=transitions)


BUGS = {
    "resends are applied again": (r"if is_found or seen_key then", Damage.OP_TWICE),
    # Each change is there once and followed the rules; only its caller wanted it on another version.
    "any revision will do": (r"if expected ~= '' and expected ~= revision then", None),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_script_is_caught(server: Server, proxy: FaultProxy, bug: str) -> None:
    """The same writers and the same faults, a guard of the script left out."""
    guard, damage = BUGS[bug]
    done = run(server, proxy, without(guard))
    violations = [violation for history in done.histories if (violation := check(history)) is not None]
    assert len(violations) >= len(done.histories) // 2
    assert all(str(violation.unexplained) in str(violation) for violation in violations)
    found = {finding.damage for finding in done.findings}
    assert (damage in found) if damage else not found
