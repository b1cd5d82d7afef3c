"""A namespace beside its model: how to call both, and how to compare them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

import attrs
from hypothesis.stateful import RuleBasedStateMachine

from redisflow import Flow, FlowError, FlowManager, FlowStatus, RevisionMismatch
from tests.support.model import Model, ModelEvent, ModelFlow, Refused, exact
from tests.support.model_input import IDS
from tests.support.subjects import brought_id, drawn_id

NOW = "the server's time"  # stands in the model's state for what only the server knows


class Replayable(NamedTuple):
    """A call under an operation id, to be made again.

    Attributes:
        outlives: whether it is recognized when the flow was deleted.
    """

    real: Callable[[], Any]
    modelled: Callable[[], Any]
    flow_id: UUID
    outlives: bool


class SideBySide(RuleBasedStateMachine):
    """One namespace of a server, held against the model of it; the rules are for a subclass to add."""

    connect: ClassVar[Callable[[], FlowManager]]
    raw: ClassVar[Any]  # a client of the same server

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.flows = type(self).connect()
            self.flows.connect()
        self.model = Model()
        self.sound = True
        self.copies: dict[UUID, list[Flow]] = {flow_id: [] for flow_id in IDS}
        self.step_ids: dict[tuple[UUID, str], tuple[Any, Any]] = {}
        self.replayable: list[Replayable] = []

    def reference(self, slot: int, form: str) -> tuple[Any, Flow | None]:
        """The flow as an argument, and the copy whose version it carries."""
        flow_id = IDS[slot]
        if form in {"uuid", "text"} or not self.copies[flow_id]:
            return (str(flow_id) if form == "text" else flow_id), None
        held = self.copies[flow_id][-1 if form != "copy" else len(self.copies[flow_id]) // 2]
        if form == "evolved":
            return attrs.evolve(held, state={"evil": 1}, current_step="evil", cancel_requested=True), held
        if form == "written into" and isinstance(held.state, dict):
            self.copies[flow_id].remove(held)
            held.state["evil"] = 1
        return held, held

    def guards(self, slot: int, expect: str | None, held: Flow | None, op: str | None) -> tuple[Any, Any]:
        """The options of a call, and those of the model's."""
        stored = self.model.flows.get(IDS[slot])
        current = 0 if stored is None else stored.revision
        expected = {None: None, "current": current, "wrong": current + 1, "copy": current}[expect]
        if expect == "copy" and held is not None:
            expected = held.revision
        etag = held.etag if held is not None and held.revision == expected else None
        op_id = self.op_id(slot, op)
        options = {"expected_revision": expected, "op_id": op_id}
        return options, {"expected": expected, "expected_etag": etag, "op": op_id}

    def op_id(self, slot: int, op: str | None) -> str | None:
        """Return a fresh operation id of a kind."""
        stored = self.model.flows.get(IDS[slot])
        past = self.model.pasts.get(IDS[slot]) if stored is None else stored.past
        if op == "drawn" and past is None:
            return drawn_id()
        # Nobody knows of an id of the library's which was meant, the flow that was deleted or the one after it.
        return brought_id() if op else None

    def both(
        self,
        flow_id: UUID,
        real: Callable[[], Any],
        modelled: Callable[[], Any],
        op: str | None = None,
        *,
        outlives: bool = False,
    ) -> Any:
        """Carry a call out on both sides; the answers must agree, and then what is stored."""
        if op:
            self.replayable.append(Replayable(real, modelled, flow_id, outlives))
        self.sound = False
        refusal, error, answer, expected = None, None, None, None
        try:
            expected = modelled()
        except Refused as refused:
            refusal = refused
        try:
            answer = real()
        except FlowError as refused:
            error = refused
        assert (type(error).__name__ if error else None) == (refusal.name if refusal else None), (
            f"{error!r}, {refusal!r}"
        )
        for name, fact in refusal.facts.items() if refusal else ():
            if not isinstance(error, RevisionMismatch) or name != "expected" or fact is not None:
                assert getattr(error, name) == fact
        assert not isinstance(answer, bool) or answer is expected
        self.compare(flow_id, answer)
        return answer

    def compare(self, flow_id: UUID, answer: Any) -> None:
        """Hold one stored flow, and the flow a call returned, against the model."""
        self.sound = False
        self._compare(flow_id, answer)
        self.sound = True

    def _compare(self, flow_id: UUID, answer: Any) -> None:
        stored, modelled = self.flows.get(flow_id), self.model.flows.get(flow_id)
        if modelled is None:
            assert stored is None
            assert self.flows.list_events(flow_id) == []
            return
        assert stored is not None
        if modelled.created_at is None:
            modelled.created_at = stored.created_at
            assert stored.updated_at == stored.created_at
        if stored.etag != modelled.etag:
            assert modelled.updated_at is None or stored.updated_at >= modelled.updated_at
            modelled.etag, modelled.updated_at = stored.etag, stored.updated_at
        assert as_mapping(stored) == as_expected(modelled, stored)
        if isinstance(answer, Flow):
            assert as_mapping(answer) == as_mapping(stored)
            self.copies[flow_id] = [*self.copies[flow_id][-4:], answer]
        (last,) = self.flows.list_events(flow_id, 1)
        assert same_event(last, modelled.events[-1])

    def compare_step(self, flow_id: UUID, step: Any) -> None:
        for name, value in self.model.flows[flow_id].steps[step.run_id].items():
            assert exact(getattr(step, name)) == exact(value)
        born = self.step_ids.setdefault((flow_id, step.run_id), (step.id, step.created_at))
        assert (step.id, step.created_at) == born

    def teardown(self) -> None:
        """The trails are without gaps; the indexes hold just what the hashes say."""
        try:
            if not self.sound:
                return  # a step has failed: that says more
            for flow_id, modelled in self.model.flows.items():
                self.compare(flow_id, None)
                trail = list(self.flows.iter_events(flow_id))
                assert len(trail) == len(modelled.events)
                assert all(same_event(*pair) for pair in zip(trail, modelled.events, strict=True))
                made = [event.revision for event in trail if event.kind not in {"note", "step_observed"}]
                assert made == list(range(modelled.revision + 1))
                assert Counter(step.run_id for step in self.flows.list_steps(flow_id)) == Counter(list(modelled.steps))
                for step in self.flows.list_steps(flow_id):
                    self.compare_step(flow_id, step)
            assert self.keys() == self.expected_keys()
        finally:
            self.flows.close()

    def keys(self) -> dict[str, set[bytes]]:
        """Every key of the namespace but its meta and tombstones, with the members of the sets, by kind and name."""
        found: dict[str, set[bytes]] = {}
        buried: set[str] = set()
        for key in self.raw.scan_iter(match=f"{{{self.flows.namespace.prefix}:*", count=1000):
            name = key.decode().partition("}:")[2]
            if name.startswith("flow:") and self.raw.hexists(key, "gone"):
                assert 0 < self.raw.pttl(key) <= 3_600_000
                buried.add(name.removeprefix("flow:"))
                continue
            assert self.raw.pttl(key) == -1
            members = set[bytes]()
            if self.raw.type(key) == b"zset":
                members |= set(self.raw.zrange(key, 0, -1))
            if name.startswith("seen:"):
                members -= set(self.raw.zrangebyscore(key, "-inf", 0))  # those that were refused
                if not members:
                    continue
            found.setdefault(name, set()).update(members)
        # A refused operation of a flow that never was leaves one, too.
        assert {str(flow_id) for flow_id in self.model.pasts} <= buried
        assert buried.isdisjoint(str(flow_id) for flow_id in self.model.flows)
        return found

    def expected_keys(self) -> dict[str, set[bytes]]:
        expected: dict[str, set[bytes]] = {}
        for flow in self.model.flows.values():
            name = str(flow.id).encode()
            expected[f"flow:{flow.id}"] = expected[f"events:{flow.id}"] = set()
            if flow.ops - {flow.created_by}:
                expected[f"seen:{flow.id}"] = {op.encode() for op in flow.ops - {flow.created_by} if op}
            if flow.steps:
                expected[f"steps:{flow.id}"] = set()
            expected.setdefault(f"owner:{flow.identity['owner_session_key']}", set()).add(name)
            expected.setdefault(f"status:{flow.status}", set()).add(name)
            if flow.status != "waiting" or flow.wait is None:
                continue
            known = flow.wait["kind"] in {"timer", "external_event", "manual"}
            if flow.cancel_requested or (known and flow.wait.keys() & {"at", "deadline"}):
                expected.setdefault("due", set()).add(name)
            if flow.wait["kind"] == "external_event":
                expected.setdefault("waiters", set()).add(b"t\0c\0" + name)
        return expected


def as_mapping(flow: Flow) -> Any:
    """A flow's values, in the exact form."""
    return exact({field.name: getattr(flow, field.name) for field in attrs.fields(Flow) if field.name != "_base"})


def as_expected(modelled: ModelFlow, stored: Flow) -> Any:
    """What a stored flow must look like, in the exact form."""
    state = modelled.state
    if isinstance(state, dict) and isinstance(state.get("failure"), dict) and state["failure"].get("at") == NOW:
        at = stored.updated_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        state = {**state, "failure": {**state["failure"], "at": at}}
    return exact(
        {
            **modelled.identity,
            "id": modelled.id,
            "current_step": modelled.current_step,
            "state": state,
            "wait": modelled.wait,
            "status": FlowStatus(modelled.status),
            "cancel_requested": modelled.cancel_requested,
            "revision": modelled.revision,
            "etag": modelled.etag,
            "created_at": modelled.created_at,
            "updated_at": modelled.updated_at,
        }
    )


def same_event(event: Any, modelled: ModelEvent) -> bool:
    """Whether an event says what it must."""
    wanted = (modelled.revision, modelled.kind, exact(modelled.payload))
    return (event.revision, event.kind, exact(event.payload)) == wanted
