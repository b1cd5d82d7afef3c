"""What a router dropped, the kernel sends again long after its caller has settled the call: it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import FlowManager, StepObservation
from redisflow.flow import Flow
from tests.support.caller import VERBS
from tests.support.lua import EVERY_SCRIPT
from tests.support.network import CLIENT, CLIENTS_OTHER, SERVER, Caller, Network, missing
from tests.support.resends import IDENTITY, sent
from tests.support.servers import Engine, Server
from tests.support.subjects import NEWEST
from tests.support.waiting import wait_until

SHELLS = ("sync", "asyncio")
SETTLERS = ("another process", "the same process")
CHANGES = {"update_state": "state_updated", "append_event": "paid", "record_step_observation": "step_observed"}
CREATION = "create_managed"
assert VERBS.keys() == {"get", CREATION, *CHANGES}
# The kernel sends again after 0.2 s, and each time after twice as long.
SENT_AGAIN_WITHIN_S = 120.0

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@attrs.define(eq=False)
class Case:
    """A call whose packet was held up, and what became of it.

    Attributes:
        unknown: the outcome of the call.
        settled: the outcome of its settling.
        before, after: the flow, before and after the held-up packet was executed.
        executions: how often it was.
    """

    engine: str
    shell: str
    verb: str
    settler: str
    url: str
    flow_id: UUID = attrs.field(factory=uuid4)
    unknown: dict[str, str] = attrs.field(factory=dict)
    settled: dict[str, str] = attrs.field(factory=dict)
    before: Any = None
    after: Any = None
    executions: int = 0

    @property
    def op_id(self) -> str:
        """The id of its operation."""
        return self.unknown["op_id"]

    def call(self, verb: str, op_id: str = "") -> dict[str, str | None]:
        """Return what a `Caller` is asked for."""
        return {"url": self.url, "flow": str(self.flow_id), "verb": verb, "op_id": op_id or None}


class Story:
    """Every case at the same time: they share a router, servers, and the wait for the kernel."""

    def __init__(self, stack: ExitStack) -> None:
        self._prefix = f"t{uuid4().hex}"
        self._network = stack.enter_context(Network())
        self._servers: dict[str, Server] = {}
        self._flows: dict[str, FlowManager] = {}
        self._monitors: dict[str, Any] = {}
        listening = ("--bind", SERVER, "127.0.0.1", "--protected-mode", "no")
        for engine in NEWEST:
            server = stack.enter_context(Server(self._network.engine(engine), *listening))
            raw: Any = server.client(unix_socket_path=str(server.socket_path), decode_responses=True)
            for script in EVERY_SCRIPT:
                raw.script_load(script.source.text.decode())
            self._servers[engine.name] = server
            self._flows[engine.name] = stack.enter_context(FlowManager.from_url(server.unix_url, prefix=self._prefix))
            self._monitors[engine.name] = stack.enter_context(raw.monitor())
        self.cases = [
            Case(*names, f"redis://{SERVER}:{self._servers[names[0]].port}/0?socket_timeout=0.5")
            for names in product(self._servers, SHELLS, [CREATION, *CHANGES], SETTLERS)
        ]
        inside = {"another process": self._network.server, "the same process": self._network.client}
        self._callers = {
            (shell, settler): stack.enter_context(Caller(inside[settler], shell, prefix=self._prefix, deadline_s=2.0))
            for shell, settler in product(SHELLS, SETTLERS)
        }

    def tell(self) -> None:
        """Let it happen."""
        for case in self.cases:
            if case.verb != CREATION:
                self._flows[case.engine].create_mirrored(**IDENTITY, flow_id=case.flow_id, state={"paid": 0})
        self._ask(SETTLERS[1], [(case, case.call("get")) for case in self.cases])  # each has a connection
        self._network.drop()
        outcomes = self._ask(SETTLERS[1], [(case, case.call(case.verb)) for case in self.cases])
        for case in self.cases:
            case.unknown = outcomes[case]
            assert case.unknown["error"] == "OutcomeUnknown", case
        self._network.send_from(CLIENTS_OTHER)
        for settler in SETTLERS:
            self._settle(settler, [case for case in self.cases if case.settler == settler])
        for case in self.cases:
            case.before = self._changed_by_another_worker(case)
        assert not self._held_up(), "what was held up has arrived already"
        self._network.forward()
        arrived: list[str] = []

        def all_arrived() -> bool:
            arrived.extend(self._held_up())
            return {case.op_id for case in self.cases} <= set(arrived)

        wait_until(all_arrived, description="what the kernel still holds arrives", timeout_s=SENT_AGAIN_WITHIN_S)
        for case in self.cases:
            case.after, case.executions = self._flows[case.engine].get(case.flow_id), arrived.count(case.op_id)

    def case(self, engine: Engine, *names: str) -> Case:
        """Return a case."""
        return next(
            one for one in self.cases if (one.engine, one.shell, one.verb, one.settler) == (engine.name, *names)
        )

    def trail(self, case: Case) -> list[Any]:
        """Return the events of a flow."""
        return self._flows[case.engine].list_events(case.flow_id)

    def steps(self, case: Case) -> list[Any]:
        """Return the steps of a flow."""
        return self._flows[case.engine].list_steps(case.flow_id)

    def refused(self, engine: Engine) -> int:
        """Return how many attempts a server refused because they did not know the flow's fence."""
        server = self._servers[engine.name]
        raw: Any = server.client(unix_socket_path=str(server.socket_path), decode_responses=True)
        errors: int = raw.info("errorstats").get("errorstat_FENCED", {"count": 0})["count"]
        return errors

    def _ask(self, settler: str, calls: Sequence[tuple[Case, Mapping[str, str | None]]]) -> dict[Case, dict[str, str]]:
        outcomes: dict[Case, dict[str, str]] = {}
        for shell in SHELLS:
            self._callers[shell, settler].ask([call for case, call in calls if case.shell == shell])
        for shell in SHELLS:
            some = [case for case, _ in calls if case.shell == shell]
            outcomes |= zip(some, self._callers[shell, settler].answers(), strict=True)
        return outcomes

    def _settle(self, settler: str, cases: Sequence[Case]) -> None:
        """Settle calls; again, where this remains unknown on a machine that is busy."""
        left = list(cases)

        def are_settled() -> bool:
            calls = [(case, case.call(case.verb, case.op_id)) for case in left]
            for case, outcome in self._ask(settler, calls).items():
                case.settled = outcome
            left[:] = [case for case in left if case.settled["error"] == "OutcomeUnknown"]
            assert not left, left
            return True

        wait_until(are_settled, description="the calls are settled", timeout_s=30.0, ignoring=(AssertionError,))

    def _changed_by_another_worker(self, case: Case) -> Flow | None:
        flows = self._flows[case.engine]
        if case.verb == CREATION:
            assert flows.delete(case.flow_id)
            return None
        flows.append_event(case.flow_id, "aside")
        flows.record_step_observation(StepObservation(case.flow_id, "run", "task", "succeeded"))
        return flows.update_state(case.flow_id, increment={"aside": 1})

    def _held_up(self) -> list[str]:
        """Return the ids of the operations whose held-up packets were executed since the last look."""
        found = []
        for monitor in self._monitors.values():
            while monitor.connection.can_read(timeout=0):
                heard = monitor.next_command()
                words = heard["command"].encode().split(b" ")
                if words[0] == b"EVALSHA" and heard["client_address"] == CLIENT and (call := sent(words)):
                    found.append(call[1].decode())
        return found


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    """The story, told once."""
    with ExitStack() as stack:
        story = Story(stack)
        story.tell()
        yield story


@pytest.mark.parametrize("settler", SETTLERS)
@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("engine", NEWEST, ids=str)
def test_a_packet_that_arrives_after_its_call_was_settled_changes_nothing(
    story: Story, engine: Engine, shell: str, verb: str, settler: str
) -> None:
    """Whoever settled it: the server executes it once, and the flow is as another worker left it."""
    case = story.case(engine, shell, verb, settler)
    assert case.settled["error"] == ""
    assert case.executions == 1
    assert case.after == case.before
    assert case.after.state["paid"] == (verb == "update_state")
    assert [event.kind for event in story.trail(case) if event.op_id == case.op_id] == [CHANGES[verb]]
    assert [step.status for step in story.steps(case)] == ["succeeded"]


@pytest.mark.parametrize("settler", SETTLERS)
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("engine", NEWEST, ids=str)
def test_a_creation_that_arrives_after_its_flow_was_deleted_does_not_bring_it_back(
    story: Story, engine: Engine, shell: str, settler: str
) -> None:
    """It was settled, so that there was a flow; another worker deleted that."""
    case = story.case(engine, shell, CREATION, settler)
    assert case.settled["error"] == ""
    assert case.executions == 1
    assert case.after is None
    assert story.trail(case) == []


@pytest.mark.parametrize("engine", NEWEST, ids=str)
def test_such_packets_are_refused_by_their_fences(story: Story, engine: Engine) -> None:
    """The server has read each of them."""
    assert story.refused(engine) >= sum(case.engine == engine.name for case in story.cases)
