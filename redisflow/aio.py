"""The asyncio manager.

Every method is one line: it hands an operation of `redisflow.ops` to be carried out. Each rule stands there, or
in a script, once. `redisflow.manager.FlowManager` has the same names and arguments, and says what each raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import UUID

import redis.asyncio
from redis.asyncio.cluster import RedisCluster

from redisflow.aio_cluster_wire import AsyncClusterWire
from redisflow.aio_link import AsyncLink, drive
from redisflow.aio_wire import AsyncWire
from redisflow.calls import Call, Lost, Op, Pages, T
from redisflow.connection import ClusterEndpoint, Endpoint, endpoint_of, taken_from, url_of
from redisflow.delivery import TROUBLES, first_attempt, go_on
from redisflow.diagnosis import Diagnosis
from redisflow.flow import Flow, FlowEvent, FlowRef, FlowStatus, FlowStep, NewFlow, StepObservation, StepRuntime
from redisflow.link import LinkView, view_of
from redisflow.ops import batches, changes, creation, doctor, follow, reads, records, rewriting, upkeep
from redisflow.settings import Settings
from redisflow.waits import AnyWait


class AsyncFlowManager:
    """Flows in one namespace of a server or a cluster, for asyncio.

    Belongs to the event loop it is first used in; safe to share between its tasks. Nothing is sent before the
    first use, or `async with`. A cancelled call may have been applied: calling again with the same `op_id`, chosen
    by the caller beforehand, settles it. Otherwise as `FlowManager`.
    """

    def __init__(self, client: redis.asyncio.Redis | RedisCluster, prefix: str = "redisflow", **options: Any) -> None:
        """Use the server of a client of `redis.asyncio`, as `FlowManager` does that of a client of `redis`."""
        taken = taken_from(client, "AsyncFlowManager", (redis.asyncio.Redis, RedisCluster))

        async def endpoint() -> Endpoint | ClusterEndpoint:
            return taken

        self._set_up(endpoint, Settings(prefix=prefix, **options))

    @classmethod
    def from_url(cls, url: str | None = None, *, prefix: str = "redisflow", **options: Any) -> Self:
        """Use the server at a URL, as `FlowManager.from_url` does."""
        checked = url_of(url)

        async def endpoint() -> Endpoint | ClusterEndpoint:
            if checked.startswith("embedded:"):  # starting a server takes a while
                return await asyncio.to_thread(endpoint_of, checked, is_async=True)
            return endpoint_of(checked, is_async=True)

        manager = cls.__new__(cls)
        manager._set_up(endpoint, Settings(prefix=prefix, **options))  # noqa: SLF001 - the other constructor
        return manager

    def _set_up(self, endpoint: Callable[[], Awaitable[Endpoint | ClusterEndpoint]], settings: Settings) -> None:
        self.namespace = settings.namespace()
        self._link: AsyncLink | LinkView = AsyncLink(endpoint, settings)
        self._is_view = False

    # --- carrying out operations ---

    async def perform(self, op: Op[T]) -> T:
        """Carry out an operation of `redisflow.ops`, and return what it returns."""
        link = self._link
        wire = link.wire or await self.connect()
        policy = link.policy
        answer: Any
        try:
            wanted = next(op)
            if type(wanted) is not Call or wanted.doubtful or policy.confirm is not None:
                return await drive(wire, go_on(op, wanted, policy))
            # Nearly every operation is one call, and is answered: of thousands under way, each waits just here.
            sent_s = policy.clock()
            try:
                (answer,) = await wire.exchange(first_attempt(wanted, sent_s, policy))
            except Lost as lost:
                answer = lost
            if type(answer) in TROUBLES:
                return await drive(wire, go_on(op, wanted, policy, answer, sent_s))
            return await drive(wire, go_on(op, op.send(answer), policy))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _pages(self, pages: Pages[T]) -> AsyncIterator[T]:
        while (page := await self.perform(pages.next_page())) is not None:
            for item in page:
                yield item

    async def connect(self) -> AsyncWire | AsyncClusterWire:
        """Connect and check the server and the namespace now; otherwise the first use does."""
        return await self._link.connect(self.namespace)

    async def aclose(self) -> None:
        """Close the connections. The next use opens new ones, in whatever event loop it happens.

        A view's are left to the manager it came from.
        """
        if not self._is_view:
            await self._link.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def for_owner(self, owner: str) -> Self:
        """A view of one owner's flows: other owners' are to it as if they did not exist."""
        return view_of(self, namespace=self.namespace.for_owner(owner))

    def with_durability(self, durability: str) -> Self:
        """A view whose changes succeed when so many replicas have them: `local`, `replicas:N` or `all`."""
        return view_of(self, _link=self._link.confirming(durability))

    # --- creating ---

    async def create_managed(
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
    ) -> Flow:
        """Create a flow: status created, revision 0."""
        return await self.perform(
            creation.create(
                self.namespace,
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

    async def create_mirrored(
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
    ) -> Flow:
        """Create a flow for work that already runs elsewhere: status running, revision 1, two events."""
        return await self.perform(
            creation.create(
                self.namespace,
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

    async def create_many(self, inputs: Iterable[NewFlow], *, exist_ok: bool = False) -> list[Flow]:
        """Create flows, each as by `create_managed`, many to a round trip; bad input is refused before any is sent.

        Raises:
            PartialFailure: some could not be created; the error names each, and has the others, which were created.
        """
        return await self.perform(batches.create_many(self.namespace, inputs, exist_ok=exist_ok))

    # --- reading ---

    async def get(self, flow_id: FlowRef) -> Flow | None:
        """Read one flow; `None` if there is none."""
        return await self.perform(reads.get(self.namespace, flow_id))

    async def get_many(self, flow_ids: Iterable[FlowRef]) -> list[Flow | None]:
        """Read flows by id, in the order given; `None` for each there is not."""
        return await self.perform(reads.get_many(self.namespace, flow_ids))

    async def list_by_owner(self, owner: str, *, limit: int | None = None) -> list[Flow]:
        """The flows of an owner, newest first. A damaged flow is left out and logged."""
        return await self.perform(reads.list_by_owner(self.namespace, owner, limit))

    async def list_by_status(
        self, status: FlowStatus | str, *, limit: int | None = None, updated_before: datetime | None = None
    ) -> list[Flow]:
        """The flows in a status, the longest unchanged first. A damaged flow is left out and logged."""
        return await self.perform(reads.list_by_status(self.namespace, status, limit, updated_before))

    def iter_by_owner(self, owner: str, *, page: int = 500) -> AsyncIterator[Flow]:
        """Every flow of an owner, newest first, `page` at a time in memory."""
        return self._pages(reads.Listing.of_owner(self.namespace, owner, page))

    def iter_by_status(
        self, status: FlowStatus | str, *, page: int = 500, updated_before: datetime | None = None
    ) -> AsyncIterator[Flow]:
        """Every flow in a status, the longest unchanged first, `page` at a time in memory."""
        return self._pages(reads.Listing.of_status(self.namespace, status, updated_before, page))

    async def count_by_status(self) -> dict[FlowStatus, int]:
        """How many flows are in each status."""
        return await self.perform(reads.count_by_status(self.namespace))

    # --- the lifecycle ---

    async def start_running(
        self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Created or waiting → running."""
        return await self.perform(
            changes.start_running(self.namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    async def set_waiting(
        self, flow: FlowRef, wait: AnyWait, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running → waiting, for a Timer, an ExternalEvent, a Manual, or a mapping of another kind."""
        return await self.perform(
            changes.set_waiting(self.namespace, flow, wait, expected_revision=expected_revision, op_id=op_id)
        )

    async def resume(
        self,
        flow: FlowRef,
        state_patch: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Created or waiting → running, the wait cleared and the patch merged into the state."""
        return await self.perform(
            changes.resume(self.namespace, flow, state_patch, expected_revision=expected_revision, op_id=op_id)
        )

    async def finish(
        self,
        flow: FlowRef,
        final_state: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Running → finished, the patch merged into the state."""
        return await self.perform(
            changes.finish(self.namespace, flow, final_state, expected_revision=expected_revision, op_id=op_id)
        )

    async def fail(
        self, flow: FlowRef, reason: str, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running or waiting → failed, with `state["failure"] = {"reason", "at"}`, `at` as RFC 3339 text.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return await self.perform(
            changes.fail(self.namespace, flow, reason, expected_revision=expected_revision, op_id=op_id)
        )

    async def request_cancel(
        self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Set the sticky cancel flag: from now on only `cancel` goes through."""
        return await self.perform(
            changes.request_cancel(self.namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    async def cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Created, running or waiting → cancelled, whether or not it was requested."""
        return await self.perform(
            changes.cancel(self.namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    async def update_state(
        self,
        flow: FlowRef,
        patch: Any = None,
        *,
        next_step: str | None = None,
        increment: Mapping[str, int] | None = None,
        unset: Iterable[str] = (),
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Merge into the state and move the step, in any live status; the status stays."""
        return await self.perform(
            changes.update_state(
                self.namespace,
                flow,
                patch,
                next_step=next_step,
                increment=increment,
                unset=unset,
                expected_revision=expected_revision,
                op_id=op_id,
            )
        )

    async def update_and_append(
        self,
        flow: Flow,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> tuple[Flow, FlowEvent]:
        """Write step, state, status, wait and cancel flag of `flow`, if it is still the stored version."""
        return await self.perform(
            rewriting.update_and_append(
                self.namespace, flow, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    async def mutate(
        self,
        flow_id: FlowRef,
        fn: Callable[[Flow], Flow],
        *,
        kind: str,
        payload: Any = None,
        retries: int = 8,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Read, apply `fn`, compare and write; again from the read, up to `retries` times, when another writer won."""
        return await self.perform(
            rewriting.mutate(
                self.namespace,
                flow_id,
                fn,
                kind=kind,
                payload=payload,
                retries=retries,
                expected_revision=expected_revision,
                op_id=op_id,
            )
        )

    # --- records ---

    async def append_event(
        self,
        flow_id: FlowRef,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> FlowEvent:
        """Append an audit entry alone, whatever the status; the revision stays."""
        return await self.perform(
            records.append_event(
                self.namespace, flow_id, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    async def list_events(self, flow_id: FlowRef, limit: int | None = 100) -> list[FlowEvent]:
        """The last `limit` events, newest first; none for a limit below 1, all for `None`."""
        return await self.perform(records.list_events(self.namespace, flow_id, limit))

    def iter_events(self, flow_id: FlowRef, *, after: str | None = None) -> AsyncIterator[FlowEvent]:
        """Every event, oldest first; with `after`, those behind that event id."""
        return self._pages(records.Trail(self.namespace, flow_id, after))

    async def record_step_observation(
        self,
        observation: StepObservation,
        *,
        runtime: StepRuntime | str = StepRuntime.MIRRORED,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> FlowStep:
        """Insert or update the step `(flow_id, run_id)`, whatever the flow's status; the revision stays."""
        return await self.perform(
            records.record_step_observation(
                self.namespace, observation, runtime=runtime, expected_revision=expected_revision, op_id=op_id
            )
        )

    async def list_steps(self, flow_id: FlowRef) -> list[FlowStep]:
        """Every step of a flow, oldest first."""
        return await self.perform(records.list_steps(self.namespace, flow_id))

    async def find_step_by_run_id(self, flow_id: FlowRef, run_id: str) -> FlowStep | None:
        """One step of a flow; `None` if that run was never observed."""
        return await self.perform(records.find_step_by_run_id(self.namespace, flow_id, run_id))

    # --- following ---

    def watch(
        self, flow_id: FlowRef, *, after: str | None = None, timeout: float | None = None
    ) -> AsyncIterator[FlowEvent]:
        """Yield events as they happen, on a connection of its own; ends at the one that ends the flow."""
        return self._pages(follow.Watch(self.namespace, flow_id, after, timeout))

    async def wait_for(
        self,
        flow_id: FlowRef,
        *statuses: FlowStatus | str,
        timeout: float | None = None,  # noqa: ASYNC109 - the sync manager has it too
    ) -> Flow:
        """Wait until the flow is in one of `statuses`; by default, until it has ended."""
        return await self.perform(follow.wait_for(self.namespace, flow_id, statuses, timeout))

    # --- upkeep ---

    async def delete(self, flow_id: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> bool:
        """Delete a flow, live or not, with every key of its. Returns whether there was one."""
        return await self.perform(
            upkeep.delete(self.namespace, flow_id, expected_revision=expected_revision, op_id=op_id)
        )

    async def prune_terminal_flows(self, older_than: timedelta) -> int:
        """Delete ended flows that have not changed for `older_than`, never a live one. Returns how many.

        Raises:
            PartialFailure: some could not be deleted; it stops after their page, which holds 500 flows.
        """
        return await self.perform(upkeep.prune_terminal_flows(self.namespace, older_than))

    async def doctor(self, *, repair: bool = False, quiet_after: timedelta = timedelta(days=1)) -> Diagnosis:
        """Examine the server, the namespace and everything in it, a page at a time; the store may be in use."""
        return await self.perform(doctor.doctor(self.namespace, repair=repair, quiet_after=quiet_after))
