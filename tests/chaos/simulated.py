"""Concurrent executions of one flow without a server: the model of the rules behind a network that loses replies."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from typing import Any
from uuid import UUID

import attrs

from tests.chaos.history import UNKNOWN, Operation, Outcome
from tests.chaos.specification import CREATIONS, Noted, Refusal, Version
from tests.support.model import TERMINAL, Model, ModelFlow, Refused, incremented, merged

FLOW_ID = UUID(int=7)
IDENTITY = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
_KINDS = {
    "start_running": ("started", "running"),
    "set_waiting": ("waiting", "waiting"),
    "resume": ("resumed", "running"),
    "finish": ("finished", "finished"),
    "fail": ("failed", "failed"),
    "cancel": ("cancelled", "cancelled"),
    "request_cancel": ("cancel_requested", None),
    "update_state": ("state_updated", None),
}


class Store:
    """One flow, as the rules have it. What is broken in a broken one is a method of it."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.model = Model()
        self.past: list[Version] = []
        self.noted: dict[str, Noted] = {}
        self.struck = 0  # how many times what is broken made a difference

    def run(self, op_id: str, verb: str, arguments: Mapping[str, Any]) -> Outcome:
        """Carry out an attempt."""
        try:
            answer = self.attempt(op_id, verb, dict(arguments))
        except Refused as refused:
            facts = {name: fact for name, fact in refused.facts.items() if name != "flow_id"}
            return Refusal.named(refused.name, facts)
        current = self.current()
        if current is not None and current not in self.past[-1:]:
            self.past.append(current)
        return answer

    def current(self) -> Version | None:
        flow = self.model.flows.get(FLOW_ID)
        return None if flow is None else Version.of(flow)

    def revision(self) -> int:
        flow = self.model.flows.get(FLOW_ID)
        return -1 if flow is None else flow.revision

    def attempt(self, op_id: str, verb: str, arguments: dict[str, Any]) -> Outcome:
        self.change(op_id, verb, arguments)
        return self.noted.setdefault(op_id, Noted(self.revision())) if verb == "append_event" else self.current()

    def change(self, op_id: str | None, verb: str, arguments: dict[str, Any], pending: str = "") -> None:
        if verb == "get":
            return
        if verb in CREATIONS:
            self.model.create(
                FLOW_ID,
                IDENTITY,
                arguments.get("state"),
                mirrored=verb == "create_mirrored",
                exist_ok=bool(arguments.get("exist_ok")),
                op=op_id,
            )
            return
        guards: dict[str, Any] = {
            "expected": arguments.get("expected_revision"),
            "expected_etag": None,
            "op": op_id,
        }
        if verb == "append_event":
            self.model.append_event(FLOW_ID, "note", {}, **guards)
            return
        kind, target = _KINDS[verb]
        lenient = {"request_cancel": ("ignore", "ignore"), "cancel": ("allow", "refuse")}
        when_pending, when_terminal = lenient.get(verb, ("refuse", "refuse"))
        self.model.change(
            FLOW_ID,
            kind,
            {},
            lambda flow: self.edit(flow, verb, arguments),
            target=target,
            pending=pending or when_pending,
            terminal=when_terminal,
            **guards,
        )

    def edit(self, flow: ModelFlow, verb: str, arguments: Mapping[str, Any]) -> None:
        """Do what a verb does beside moving the status."""
        patch = next((arguments[name] for name in ("patch", "state_patch", "final_state") if name in arguments), None)
        if verb == "fail":
            patch = {"failure": {"reason": arguments["reason"], "at": str(self.chance.random())}}
        state = incremented(flow.state, arguments["increment"]) if arguments.get("increment") else flow.state
        unset = arguments.get("unset", ())
        if unset and not isinstance(state, dict):
            raise Refused("InvalidData")
        state = state if patch is None else merged(state, patch)
        flow.state = {k: v for k, v in state.items() if k not in unset} if isinstance(state, dict) else state
        flow.current_step = arguments.get("next_step") or flow.current_step
        flow.cancel_requested |= verb == "request_cancel"
        flow.events.clear()  # the copies that the model makes would grow with them


class AppliesResendsAgain(Store):
    def change(self, op_id: str | None, verb: str, arguments: dict[str, Any], pending: str = "") -> None:
        flow = self.model.flows.get(FLOW_ID)
        is_again = flow is not None and op_id in flow.ops and verb not in {"append_event", *CREATIONS}
        self.struck += is_again
        super().change(None if is_again else op_id, verb, arguments, pending)


class IgnoresExpectedRevision(Store):
    def change(self, op_id: str | None, verb: str, arguments: dict[str, Any], pending: str = "") -> None:
        self.struck += arguments.pop("expected_revision", None) not in {None, self.revision()}
        super().change(op_id, verb, arguments, pending)


class LosesAcknowledgedChanges(Store):
    def attempt(self, op_id: str, verb: str, arguments: dict[str, Any]) -> Outcome:
        before = self.model.flows.get(FLOW_ID)
        answer = super().attempt(op_id, verb, arguments)
        after = self.model.flows.get(FLOW_ID)
        if before is not None and after is not None and after.revision > before.revision and self.chance.random() < 0.1:
            self.struck += 1
            self.model.flows[FLOW_ID] = before
        return answer


class ServesStaleReads(Store):
    def attempt(self, op_id: str, verb: str, arguments: dict[str, Any]) -> Outcome:
        answer = super().attempt(op_id, verb, arguments)
        # So many versions ago that no call under way can have been the one that made the next.
        if verb == "get" and len(self.past) > 8 and self.chance.random() < 0.5:
            self.struck += 1
            return self.past[-8]
        return answer


class IncrementsTwice(Store):
    def edit(self, flow: ModelFlow, verb: str, arguments: Mapping[str, Any]) -> None:
        super().edit(flow, verb, arguments)
        if arguments.get("increment") and self.chance.random() < 0.2:
            self.struck += 1
            flow.state = incremented(flow.state, arguments["increment"])


class ChangesWhatIsToBeCancelled(Store):
    def change(self, op_id: str | None, verb: str, arguments: dict[str, Any], pending: str = "") -> None:
        stored = self.current()
        if verb in {"update_state", "finish"} and stored is not None and stored.cancel_requested:
            self.struck += stored.status not in TERMINAL
            pending = "allow"
        super().change(op_id, verb, arguments, pending)


@attrs.frozen
class Network:
    """How calls travel; the times are of the simulation.

    Attributes:
        loses_reply: the share of attempts whose reply is lost; each is followed by a resend.
        gives_up: the share of lost replies after which the caller gives up instead: the outcome is unknown.
        arrives_late: the share of those given up that reach the store only after that, or never.
    """

    loses_reply: float = 0.1
    gives_up: float = 0.1
    arrives_late: float = 0.5


_WEIGHTS = {
    "update_state": 40,
    "get": 12,
    "resume": 10,
    "set_waiting": 8,
    "append_event": 6,
    "start_running": 6,
    "request_cancel": 2,
    "create_managed": 2,
    "cancel": 1,
    "finish": 1,
    "fail": 1,
}
Choose = Callable[[Random, int], tuple[str, dict[str, Any]]]


def any_call(chance: Random, revision: int) -> tuple[str, dict[str, Any]]:
    """Draw a call; most leave the flow alive."""
    verb = chance.choices([*_WEIGHTS], [*_WEIGHTS.values()])[0]
    return verb, arguments_of(verb, chance, revision)


def any_update(chance: Random, revision: int) -> tuple[str, dict[str, Any]]:
    """Draw a call of a flow that never ends."""
    verb = chance.choices(["update_state", "get", "append_event"], [6, 2, 1])[0]
    return verb, arguments_of(verb, chance, revision)


_ARGUMENTS: dict[str, Sequence[dict[str, Any]]] = {
    "update_state": (
        *({"increment": {"n": delta}} for delta in (1, 2, 5)),
        *({"patch": {key: value}} for key in "ab" for value in (1, True, {"k": [1]})),
        {"unset": ["a"]},
        {"patch": {"b": 2}, "increment": {"n": -1}, "unset": ["a"], "next_step": "s1"},
        {"next_step": "s2"},
        {"increment": {"a": 1}},
        {"patch": "no mapping"},
    ),
    "resume": ({"state_patch": None}, {"state_patch": {"a": "resumed"}}),
    "finish": ({"final_state": {"b": "done"}},),
    "fail": ({"reason": "broken"},),
    "set_waiting": ({"wait": {"kind": "manual"}},),
    "append_event": ({"kind": "note"},),
    "create_managed": ({"state": {"n": 0}, "exist_ok": True}, {"state": {"n": 0}, "exist_ok": False}),
}


def arguments_of(verb: str, chance: Random, revision: int) -> dict[str, Any]:
    """Draw arguments; `revision` is the last the process has seen."""
    arguments = chance.choice(_ARGUMENTS.get(verb, ({},)))
    if verb not in {"get", *CREATIONS} and chance.random() < 0.2:
        return {**arguments, "expected_revision": revision}
    return arguments


class Simulation:
    """Processes that call one after the other, each in its own time, and a store that is called by all of them."""

    def __init__(self, chance: Random, store: Store, network: Network, choose: Choose, calls: int) -> None:
        self._chance = chance
        self._store = store
        self._network = network
        self._choose = choose
        self._calls = calls
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._revisions: dict[int, int] = {}
        self.history: list[Operation] = []

    def run(self, processes: int) -> list[Operation]:
        """Let the first create the flow while the others call already; at last one looks."""
        self._call(0, 0.0, "create_mirrored", {"state": {"n": 0}})
        for process in range(1, processes):
            self._soon(0.0, lambda now, process=process: self._next_call(process, now))  # type: ignore[misc]  # a default is no annotation
        self._work()
        self._calls = 0
        ended = max((op.returned_s or 0.0 for op in self.history), default=0.0)
        self._call(0, ended + 10.0, "get", {})
        self._work()
        return self.history

    def _work(self) -> None:
        while self._agenda:
            now, _, what = heapq.heappop(self._agenda)
            what(now)

    def _soon(self, now: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (now + self._chance.expovariate(1.0), next(self._order), what))

    def _next_call(self, process: int, now: float) -> None:
        if self._calls > 0:
            self._calls -= 1
            self._call(process, now, *self._choose(self._chance, self._revisions.get(process, 0)))

    def _call(self, process: int, invoked: float, verb: str, arguments: dict[str, Any]) -> None:
        op_id = f"{next(self._order)}"

        def ends(now: float, outcome: Outcome) -> None:
            self.history.append(Operation(process, verb, arguments, invoked, now, outcome))
            if isinstance(outcome, Version):
                self._revisions[process] = outcome.revision
            self._soon(now, lambda then: self._next_call(process, then))

        def arrives(now: float) -> None:
            lost = self._chance.random() < self._network.loses_reply
            if lost and self._chance.random() < self._network.gives_up:
                late = self._chance.random() < self._network.arrives_late
                if late:
                    self._soon(now + 5.0, lambda _: self._perhaps(op_id, verb, arguments))
                else:
                    self._store.run(op_id, verb, arguments)
                self._soon(now, lambda then: ends(then, UNKNOWN))
                return
            outcome = self._store.run(op_id, verb, arguments)
            if lost:
                self._soon(now, arrives)
            else:
                self._soon(now, lambda then: ends(then, outcome))

        self._soon(invoked, arrives)

    def _perhaps(self, op_id: str, verb: str, arguments: dict[str, Any]) -> None:
        if self._chance.random() < 0.5:
            self._store.run(op_id, verb, arguments)


def simulate(
    chance: Random,
    *,
    store: type[Store] = Store,
    network: Network = Network(),
    choose: Choose = any_call,
    processes: int = 4,
    calls: int = 40,
) -> tuple[list[Operation], Store]:
    """Return what was called and answered, and the store after it."""
    kept = store(chance)
    return Simulation(chance, kept, network, choose, calls).run(processes), kept
