"""Verbs of the sync manager, queued and sent together.

In asyncio there is nothing to queue: calls that are awaited together travel together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self
from uuid import UUID

from redisflow.calls import Op, T
from redisflow.flow import Flow, FlowEvent, FlowRef, FlowStep, StepObservation, StepRuntime
from redisflow.ops import changes, creation, records, rewriting
from redisflow.ops.batches import Queued, carry_out
from redisflow.ops.namespace import Namespace
from redisflow.waits import AnyWait

_PACKET = 500


class _Performer(Protocol):
    """What carries operations out: the manager."""

    namespace: Namespace

    def perform(self, op: Op[T]) -> T:
        """Carry out an operation."""


class FlowBatch:
    """Verbs that are sent together: 500 to a round trip, the last of them at the end of the `with` block.

    Each verb checks its input at once and returns a `Queued`, whose `result()` behind the block is the flow, or
    raises that verb's own error: a refusal of one leaves the others alone. They are carried out in their order, each
    as atomic as ever; the batch as a whole is not. While 500 are under way, the block queues the next. If the block
    raises, what was not sent by then is not sent. Not for use by several threads.
    """

    def __init__(self, flows: _Performer) -> None:
        self._flows = flows
        self._namespace = flows.namespace
        self._queued: list[Queued[Any]] = []
        self._flow_ids: set[UUID] = set()  # of all verbs so far
        self._firsts: dict[UUID, Queued[Any]] = {}  # each flow's first verb of those that are queued
        self._sender: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.send()
        finally:
            if self._sender is not None:
                self._sender.shutdown()
                self._sender = None

    def send(self) -> None:
        """Send what is queued, and wait until all is carried out."""
        self._settle()
        self._flows.perform(self._packet())

    def _send_behind(self) -> None:
        """Have a thread send what is queued: this one can prepare more while the server works."""
        self._settle()
        if self._sender is None:
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="redisflow-batch")
        self._under_way = self._sender.submit(self._flows.perform, self._packet())

    def _settle(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _packet(self) -> Op[None]:
        queued, self._queued, self._firsts = self._queued, [], {}
        return carry_out(queued)

    def _queue(self, op: Op[T]) -> Queued[T]:
        queued = Queued(op)
        if queued.flow_id in self._flow_ids:
            # Were one of them answered that its copy is of another status, its second round trip would be behind the
            # others.
            queued.widen()
            if (first := self._firsts.get(queued.flow_id)) is not None:
                first.widen()
        self._flow_ids.add(queued.flow_id)
        self._firsts.setdefault(queued.flow_id, queued)
        self._queued.append(queued)
        if len(self._queued) == _PACKET:
            self._send_behind()
        return queued

    def create_managed(
        self,
        *,
        controller_id: str,
        goal: str,
        owner_session_key: str | None = None,
        requester_origin: str,
        current_step: str = "init",
        state: Any = None,
        flow_id: UUID | str | None = None,
        exist_ok: bool = False,
        op_id: str | None = None,
    ) -> Queued[Flow]:
        """Queue `FlowManager.create_managed`."""
        return self._queue(
            creation.create(
                self._namespace,
                mirrored=False,
                controller_id=controller_id,
                goal=goal,
                owner_session_key=owner_session_key,
                requester_origin=requester_origin,
                current_step=current_step,
                state=state,
                flow_id=flow_id,
                exist_ok=exist_ok,
                op_id=op_id,
            )
        )

    def create_mirrored(
        self,
        *,
        controller_id: str,
        goal: str,
        owner_session_key: str | None = None,
        requester_origin: str,
        current_step: str = "init",
        state: Any = None,
        flow_id: UUID | str | None = None,
        exist_ok: bool = False,
        op_id: str | None = None,
    ) -> Queued[Flow]:
        """Queue `FlowManager.create_mirrored`."""
        return self._queue(
            creation.create(
                self._namespace,
                mirrored=True,
                controller_id=controller_id,
                goal=goal,
                owner_session_key=owner_session_key,
                requester_origin=requester_origin,
                current_step=current_step,
                state=state,
                flow_id=flow_id,
                exist_ok=exist_ok,
                op_id=op_id,
            )
        )

    def start_running(
        self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Queued[Flow]:
        """Queue `FlowManager.start_running`."""
        return self._queue(
            changes.start_running(self._namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    def set_waiting(
        self, flow: FlowRef, wait: AnyWait, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Queued[Flow]:
        """Queue `FlowManager.set_waiting`."""
        return self._queue(
            changes.set_waiting(self._namespace, flow, wait, expected_revision=expected_revision, op_id=op_id)
        )

    def resume(
        self,
        flow: FlowRef,
        state_patch: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[Flow]:
        """Queue `FlowManager.resume`."""
        return self._queue(
            changes.resume(self._namespace, flow, state_patch, expected_revision=expected_revision, op_id=op_id)
        )

    def finish(
        self,
        flow: FlowRef,
        final_state: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[Flow]:
        """Queue `FlowManager.finish`."""
        return self._queue(
            changes.finish(self._namespace, flow, final_state, expected_revision=expected_revision, op_id=op_id)
        )

    def fail(
        self, flow: FlowRef, reason: str, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Queued[Flow]:
        """Queue `FlowManager.fail`."""
        return self._queue(
            changes.fail(self._namespace, flow, reason, expected_revision=expected_revision, op_id=op_id)
        )

    def request_cancel(
        self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Queued[Flow]:
        """Queue `FlowManager.request_cancel`."""
        return self._queue(
            changes.request_cancel(self._namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    def cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Queued[Flow]:
        """Queue `FlowManager.cancel`."""
        return self._queue(changes.cancel(self._namespace, flow, expected_revision=expected_revision, op_id=op_id))

    def update_state(
        self,
        flow: FlowRef,
        patch: Any = None,
        *,
        next_step: str | None = None,
        increment: Mapping[str, int] | None = None,
        unset: Iterable[str] = (),
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[Flow]:
        """Queue `FlowManager.update_state`."""
        return self._queue(
            changes.update_state(
                self._namespace,
                flow,
                patch,
                next_step=next_step,
                increment=increment,
                unset=unset,
                expected_revision=expected_revision,
                op_id=op_id,
            )
        )

    def update_and_append(
        self,
        flow: Flow,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[tuple[Flow, FlowEvent]]:
        """Queue `FlowManager.update_and_append`."""
        return self._queue(
            rewriting.update_and_append(
                self._namespace, flow, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    def append_event(
        self,
        flow_id: FlowRef,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[FlowEvent]:
        """Queue `FlowManager.append_event`."""
        return self._queue(
            records.append_event(
                self._namespace, flow_id, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    def record_step_observation(
        self,
        observation: StepObservation,
        *,
        runtime: StepRuntime | str = StepRuntime.MIRRORED,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Queued[FlowStep]:
        """Queue `FlowManager.record_step_observation`."""
        return self._queue(
            records.record_step_observation(
                self._namespace, observation, runtime=runtime, expected_revision=expected_revision, op_id=op_id
            )
        )
