"""Random operations on real servers, held against the pure model of the rules step by step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import attrs
import fakeredis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from redisflow import Flow, FlowManager, FlowStatus, FlowStepStatus, StepObservation, StepRuntime, WaitEngine
from tests.support.model import ModelEvent, ModelFlow, Refused, incremented, merged
from tests.support.model_input import (
    IDS,
    KEYS,
    LONG_AGO,
    OWNERS,
    WAITS,
    expectations,
    forms,
    increments,
    mappings,
    ops,
    patches,
    slots,
    values,
)
from tests.support.servers import ENGINES, Server
from tests.support.side_by_side import NOW, SideBySide, same_event


class Machine(SideBySide):
    """The rules: every operation, by whatever names a flow."""

    @initialize(status=st.sampled_from(["managed", "mirrored"]))
    def begin(self, status: str) -> None:
        self.create(slot=0, mirrored=status == "mirrored", owner=OWNERS[0], state={"n": 1}, exist_ok=False, op=None)

    @rule(
        slot=slots, mirrored=st.booleans(), owner=st.sampled_from(OWNERS), state=patches, exist_ok=st.booleans(), op=ops
    )
    def create(self, *, slot: int, mirrored: bool, owner: str, state: Any, exist_ok: bool, op: str | None) -> None:
        flow_id = IDS[slot]
        identity = {"controller_id": "c", "goal": "g", "owner_session_key": owner, "requester_origin": "r"}
        method = self.flows.create_mirrored if mirrored else self.flows.create_managed
        op_id = self.op_id(slot, op)
        self.both(
            flow_id,
            lambda: method(**identity, state=state, flow_id=flow_id, exist_ok=exist_ok, op_id=op_id),
            lambda: self.model.create(
                flow_id, identity, copy.deepcopy(state), mirrored=mirrored, exist_ok=exist_ok, op=op_id
            ),
            op,
            outlives=True,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        verb=st.sampled_from(["start", "start", "cancel", "request_cancel"]),
    )
    def plain_verb(self, *, slot: int, form: str, expect: str | None, op: str | None, verb: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        method = {"start": "start_running"}.get(verb, verb)

        def flag(flow: ModelFlow) -> None:
            flow.cancel_requested = True

        changes: dict[str, Callable[[], Any]] = {
            "start": lambda: self.model.change(IDS[slot], "started", {}, target="running", **guards),
            "cancel": lambda: self.model.change(
                IDS[slot], "cancelled", {}, target="cancelled", pending="allow", **guards
            ),
            "request_cancel": lambda: self.model.change(
                IDS[slot], "cancel_requested", {}, flag, pending="ignore", terminal="ignore", **guards
            ),
        }
        self.both(IDS[slot], lambda: getattr(self.flows, method)(ref, **options), changes[verb], op)

    @rule(slot=slots, form=forms, expect=expectations, op=ops, wait=st.sampled_from(WAITS))
    def set_waiting(
        self, *, slot: int, form: str, expect: str | None, op: str | None, wait: tuple[Any, dict[str, Any]]
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        given, wire = wait

        def edit(flow: ModelFlow) -> None:
            flow.wait = dict(wire)

        self.both(
            IDS[slot],
            lambda: self.flows.set_waiting(ref, given, **options),
            lambda: self.model.change(IDS[slot], "waiting", {"wait": wire}, edit, target="waiting", **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        patch=patches,
        verb=st.sampled_from(["resume", "resume", "finish"]),
    )
    def merging_verb(self, *, slot: int, form: str, expect: str | None, op: str | None, patch: Any, verb: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        kind, name, target = {
            "resume": ("resumed", "state_patch", "running"),
            "finish": ("finished", "final_state", "finished"),
        }[verb]

        def edit(flow: ModelFlow) -> None:
            flow.state = flow.state if patch is None else merged(flow.state, patch)

        self.both(
            IDS[slot],
            lambda: getattr(self.flows, verb)(ref, patch, **options),
            lambda: self.model.change(IDS[slot], kind, {name: patch}, edit, target=target, **guards),
            op,
        )

    @rule(slot=slots, form=forms, expect=expectations, op=ops, reason=st.text(max_size=40))
    def fail(self, *, slot: int, form: str, expect: str | None, op: str | None, reason: str) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)

        def edit(flow: ModelFlow) -> None:
            flow.state = merged(flow.state, {"failure": {"reason": reason, "at": NOW}})

        self.both(
            IDS[slot],
            lambda: self.flows.fail(ref, reason, **options),
            lambda: self.model.change(IDS[slot], "failed", {"reason": reason}, edit, target="failed", **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        patch=patches,
        next_step=st.sampled_from([None, "s1", "s2"]),
        increment=increments,
        unset=st.lists(st.sampled_from([*KEYS, "absent"]), max_size=2),
    )
    def update_state(
        self,
        *,
        slot: int,
        form: str,
        expect: str | None,
        op: str | None,
        patch: Any,
        next_step: Any,
        increment: Any,
        unset: Any,
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)

        def edit(flow: ModelFlow) -> None:
            summed = incremented(flow.state, increment) if increment else flow.state
            if unset and not isinstance(summed, dict):
                raise Refused("InvalidData")
            state = summed if patch is None else merged(summed, patch)
            flow.state = {k: v for k, v in state.items() if k not in unset} if isinstance(state, dict) else state
            flow.current_step = next_step or flow.current_step

        def modelled() -> None:
            named = [*unset, *increment, *(patch if isinstance(patch, dict) else ())]
            replaced = patch is not None and not isinstance(patch, dict)
            if len(set(named)) < len(named) or (replaced and (increment or unset)):
                raise Refused("InvalidData")  # there is no order in which two would be right
            payload = {"patch": patch, "next_step": next_step}
            payload |= {"increment": increment} if increment else {}
            payload |= {"unset": unset} if unset else {}
            self.model.change(IDS[slot], "state_updated", payload, edit, **guards)

        self.both(
            IDS[slot],
            lambda: self.flows.update_state(
                ref, patch, next_step=next_step, increment=increment, unset=unset, **options
            ),
            modelled,
            op,
        )

    @rule(
        slot=slots,
        which=st.integers(0, 4),
        state=st.one_of(st.just("same"), mappings, mappings, values),
        status=st.sampled_from(["same", "same", *FlowStatus]),
        wait=st.sampled_from([None, *WAITS]),
        flag=st.sampled_from([None, None, None, True, False]),
        step=st.sampled_from(["s1", "s2"]),
        op=ops,
        through=st.sampled_from(["update_and_append", "mutate"]),
    )
    def rewrite(
        self,
        *,
        slot: int,
        which: int,
        state: Any,
        status: Any,
        wait: Any,
        flag: Any,
        step: str,
        op: str | None,
        through: str,
    ) -> None:
        flow_id = IDS[slot]
        if not self.copies[flow_id]:
            return
        held = self.copies[flow_id][which % len(self.copies[flow_id])]
        op_id = self.op_id(slot, op)

        def evolved(flow: Flow) -> Flow:
            new: dict[str, Any] = {"current_step": step}
            new |= {} if state == "same" else {"state": state}
            new |= {} if status == "same" else {"status": status}
            new |= {} if wait is None else {"wait": wait[1]}
            new |= {} if flag is None else {"cancel_requested": flag}
            return attrs.evolve(flow, **new)

        def modelled() -> None:
            if through == "mutate":
                stored = self.model.flows.get(flow_id)
                if stored is None:
                    raise Refused("FlowNotFound", flow_id=flow_id)
                base: Any = copy.deepcopy(stored)
            else:
                base = held
            target = str(base.status if status == "same" else status)
            new_wait = base.wait if wait is None else wait[1]
            if target == "waiting" and new_wait is None:
                raise Refused("InvalidData")

            def edit(flow: ModelFlow) -> None:
                flow.current_step = step
                flow.state = copy.deepcopy(base.state if state == "same" else state)
                flow.wait = dict(new_wait) if target == "waiting" else None
                flow.cancel_requested |= bool(base.cancel_requested if flag is None else flag)

            self.model.change(
                flow_id,
                "rewritten",
                {"by": step},
                edit,
                target=target,
                may_stay=True,
                pending="allow" if target == "cancelled" else "refuse",
                expected=base.revision,
                expected_etag=base.etag,
                op=op_id,
            )

        def real() -> Any:
            if through == "mutate":
                return self.flows.mutate(flow_id, evolved, kind="rewritten", payload={"by": step}, op_id=op_id)
            updated, event = self.flows.update_and_append(evolved(held), "rewritten", {"by": step}, op_id=op_id)
            assert same_event(event, ModelEvent(event.revision, "rewritten", {"by": step}))
            assert event.id in {stored.id for stored in self.flows.list_events(flow_id)}
            return updated

        self.both(flow_id, real, modelled, op)

    @rule(slot=slots, form=forms, expect=expectations, op=ops, payload=mappings)
    def append_event(self, *, slot: int, form: str, expect: str | None, op: str | None, payload: Any) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        self.both(
            IDS[slot],
            lambda: self.flows.append_event(ref, "note", payload, **options),
            lambda: self.model.append_event(IDS[slot], "note", payload, **guards),
            op,
        )

    @rule(
        slot=slots,
        form=forms,
        expect=expectations,
        op=ops,
        run_id=st.sampled_from(["r1", "r2\0é"]),
        child=st.sampled_from([None, "child", "c" * 40, "c" * 300]),
        status=st.sampled_from([*FlowStepStatus]),
        runtime=st.sampled_from([*StepRuntime]),
        result=values,
    )
    def observe(
        self,
        *,
        slot: int,
        form: str,
        expect: str | None,
        op: str | None,
        run_id: str,
        child: Any,
        status: Any,
        runtime: Any,
        result: Any,
    ) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        seen = StepObservation(ref, run_id, "task", status, child, result)
        step = {"run_id": run_id, "task": "task", "status": status, "child_session_key": child, "result": result}
        answer = self.both(
            IDS[slot],
            lambda: self.flows.record_step_observation(seen, runtime=runtime, **options),
            lambda: self.model.observe(IDS[slot], {**step, "runtime": runtime}, **guards),
            op,
        )
        if answer is not None:
            self.compare_step(IDS[slot], answer)
            assert self.flows.find_step_by_run_id(IDS[slot], run_id) == answer

    @rule()
    def replay(self) -> None:
        """Send the latest call with an op id of the caller's once more."""
        if self.replayable:
            latest = self.replayable[-1]
            self.both(latest.flow_id, latest.real, latest.modelled)

    @rule(slot=slots, form=forms, expect=expectations, op=ops)
    def delete(self, *, slot: int, form: str, expect: str | None, op: str | None) -> None:
        ref, held = self.reference(slot, form)
        options, guards = self.guards(slot, expect, held, op)
        existed = IDS[slot] in self.model.flows
        self.both(
            IDS[slot],
            lambda: self.flows.delete(ref, **options),
            lambda: self.model.delete(IDS[slot], **guards),
            op,
            outlives=op != "drawn",  # then nobody knows which it was meant for, this flow or the one after it
        )
        if existed and IDS[slot] not in self.model.flows:
            # A tombstone tells of creations and deletions. What else is called again is applied to the next flow.
            self.replayable = [entry for entry in self.replayable if entry.flow_id != IDS[slot] or entry.outlives]
            for key in [key for key in self.step_ids if key[0] == IDS[slot]]:
                del self.step_ids[key]

    @rule()
    def tick(self) -> None:
        due = self.model.due(datetime.now(UTC))
        report = WaitEngine(self.flows).tick()
        for flow_id, why in due.items():
            wait = copy.deepcopy(self.model.flows[flow_id].wait)
            if why == "cancel":
                self.model.change(flow_id, "cancelled", {}, target="cancelled", pending="allow")
            else:
                patch = {"wait_timed_out": wait} if why == "deadline" else None

                def edit(flow: ModelFlow, patch: Any = patch) -> None:
                    flow.state = flow.state if patch is None else merged(flow.state, patch)

                self.model.change(flow_id, "resumed", {"state_patch": patch}, edit, target="running")
            self.compare(flow_id, None)
        cancelled = list(due.values()).count("cancel")
        waiting = sum(flow.status == "waiting" for flow in self.model.flows.values())
        assert (report.resumed, report.cancelled) == (len(due) - cancelled, cancelled)
        assert (report.still_waiting, report.errors) == (waiting, 0)

    @rule(slot=slots, topic=st.sampled_from(["t", "t", "other"]), payload=values)
    def external_event(self, *, slot: int, topic: str, payload: Any) -> None:
        flow = self.model.flows.get(IDS[slot])
        wait = flow.wait if flow is not None and flow.status == "waiting" and not flow.cancel_requested else None
        answer = WaitEngine(self.flows).try_resume_external(IDS[slot], topic, "c", payload)
        if wait is not None and wait["kind"] == "external_event" and wait["topic"] == topic:
            patch = None if payload is None else {"resume_event": payload}

            def edit(flow: ModelFlow) -> None:
                flow.state = flow.state if patch is None else merged(flow.state, patch)

            self.model.change(IDS[slot], "resumed", {"state_patch": patch}, edit, target="running")
            assert answer is not None
        else:
            assert answer is None
        self.compare(IDS[slot], answer)

    @rule(
        owner=st.sampled_from(OWNERS),
        status=st.sampled_from([*FlowStatus]),
        limit=st.sampled_from([None, 0, 1, 2, -1]),
        page=st.integers(1, 3),
    )
    def listings(self, *, owner: str, status: FlowStatus, limit: int | None, page: int) -> None:
        kept = list(self.model.flows.values())
        owned = [flow for flow in kept if flow.identity["owner_session_key"] == owner]
        newest_first = [flow.id for flow in sorted(owned, key=lambda flow: flow.created_at or LONG_AGO, reverse=True)]
        in_status = sorted(
            (flow for flow in kept if flow.status == status), key=lambda flow: flow.updated_at or LONG_AGO
        )
        oldest_first = [flow.id for flow in in_status]
        cut = slice(None if limit is None else max(limit, 0))
        assert [flow.id for flow in self.flows.list_by_owner(owner, limit=limit)] == newest_first[cut]
        assert [flow.id for flow in self.flows.list_by_status(status, limit=limit)] == oldest_first[cut]
        assert [flow.id for flow in self.flows.iter_by_owner(owner, page=page)] == newest_first
        assert [flow.id for flow in self.flows.iter_by_status(status, page=page)] == oldest_first
        for n, flow in enumerate(in_status):
            quiet = self.flows.list_by_status(status, updated_before=flow.updated_at)
            assert [found.id for found in quiet] == oldest_first[:n]
        counts = self.flows.count_by_status()
        assert counts == {s: sum(flow.status == s for flow in kept) for s in FlowStatus}
        assert [flow and flow.id for flow in self.flows.get_many(IDS)] == [
            flow_id if flow_id in self.model.flows else None for flow_id in IDS
        ]


def hold_against_the_model(raw: Any, connect: Callable[[str], FlowManager], examples: int) -> None:
    """Run the machine on one server."""

    class OnThisServer(Machine):
        pass

    OnThisServer.connect = staticmethod(lambda: connect(f"m{uuid4().hex}"))
    OnThisServer.raw = raw

    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize="CI" in os.environ,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # Phase.explain traces: slow
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(params=ENGINES, ids=str)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each engine."""
    with Server(request.param) as server:
        yield server


def test_random_operations_on_a_server_agree_with_the_model(server: Server) -> None:
    """What a call answers, what is stored, and what is refused is what the rules say."""
    examples = 60 if server.engine is ENGINES[0] else 15
    hold_against_the_model(
        server.client(),
        lambda prefix: FlowManager.from_url(server.url, prefix=prefix, partitions=3),
        int(os.environ.get("MODEL_EXAMPLES", examples)),
    )


def test_random_operations_on_fakeredis_agree_with_the_model() -> None:
    """The in-memory backend keeps the same rules."""
    client = fakeredis.FakeRedis()
    hold_against_the_model(client, lambda prefix: FlowManager(client, prefix=prefix, partitions=3), 5)
