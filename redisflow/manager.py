"""The sync manager.

Every method is one line: it hands an operation of `redisflow.ops` to be carried out. Each rule stands there, or
in a script, once; `redisflow.aio.AsyncFlowManager` has the same names and arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol, Self, TypeVar
from uuid import UUID

import redis

from redisflow.calls import Block, Lost, Op, Packet
from redisflow.connection import Endpoint, endpoint_of, url_of
from redisflow.delivery import deliver
from redisflow.errors import InvalidData
from redisflow.flow import Flow, FlowEvent, FlowStatus, FlowStep, StepObservation, StepRuntime
from redisflow.ops import changes, follow, reads, records, upkeep
from redisflow.settings import Settings
from redisflow.waits import ExternalEvent, Manual, Timer
from redisflow.wire import Wire

FlowRef = Flow | UUID | str
AnyWait = Timer | ExternalEvent | Manual | Mapping[str, Any]
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Pages(Protocol[T_co]):
    """Something read page by page."""

    def next_page(self) -> Op:
        """Yield the calls for the next page; return its items, `None` after the last."""


class FlowManager:
    """Flows in one namespace of one server.

    Safe to share between threads; after a fork the child opens connections of its own. Nothing is sent before
    the first use, or `with`. Every changing verb takes a Flow, a UUID or its text; with a Flow whose copy is
    current the reply is two numbers. `expected_revision` makes it a compare; `op_id` settles an earlier call
    whose outcome is unknown.

    Every method may raise:
        InvalidData: bad input, before anything is sent; or stored bytes that make no sense.
        StorageError: the server cannot be reached or refuses; nothing was changed.
        OutcomeUnknown: a change may or may not have been applied before the deadline.
    """

    def __init__(self, client: redis.Redis, prefix: str = "redisflow", **options: Any) -> None:  # noqa: ANN401
        """Use the server of a client.

        Args:
            client: a `redis.Redis`. Its settings are taken; its connections are not, because it resends by itself.
            prefix: the namespace.
            **options: see `redisflow.settings.Settings`.
        """
        if not isinstance(client, redis.Redis):
            raise InvalidData(f"FlowManager takes a redis.Redis, not {type(client).__module__}.{type(client).__name__}")
        self._set_up(lambda: Endpoint.of_client(client), Settings(prefix=prefix, **options))

    @classmethod
    def from_url(cls, url: str | None = None, *, prefix: str = "redisflow", **options: Any) -> Self:  # noqa: ANN401
        """Use the server at a URL.

        Args:
            url: `redis://`, `rediss://`, `unix://`, `memory://`, `embedded://`; by default `$REDISFLOW_URL`, or
                `redis://localhost:6379/0`.
            prefix: the namespace.
            **options: see `redisflow.settings.Settings`.
        """
        checked = url_of(url)
        manager = cls.__new__(cls)
        manager._set_up(lambda: endpoint_of(checked, is_async=False), Settings(prefix=prefix, **options))
        return manager

    def _set_up(self, endpoint: Callable[[], Endpoint], settings: Settings) -> None:
        self._endpoint = endpoint
        self._settings = settings
        self._ns = settings.namespace()
        self._wire: Wire | None = None
        self._connecting = threading.Lock()

    # --- carrying out operations ---

    def _run(self, op: Op) -> Any:  # noqa: ANN401 - what the operation returns
        return self._drive(self._wire or self.connect(), op)

    def _drive(self, wire: Wire, op: Op) -> Any:  # noqa: ANN401 - what the operation returns
        steps = deliver(op, self._policy)
        try:
            step = next(steps)
            while True:
                try:
                    if type(step) is Packet:
                        reply = wire.exchange(step)
                    elif type(step) is Block:
                        reply = wire.block(step)
                    else:
                        reply = wire.pause(step.seconds)
                except Lost as lost:
                    step = steps.throw(lost)
                else:
                    step = steps.send(reply)
        except StopIteration as stop:
            return stop.value

    def _pages(self, pages: Pages[T]) -> Iterator[T]:
        while (page := self._run(pages.next_page())) is not None:
            yield from page

    def connect(self) -> Wire:
        """Connect and check the server and the namespace now; otherwise the first use does.

        Raises:
            LayoutMismatch: the namespace was created with another layout.
        """
        with self._connecting:
            if self._wire is None:
                endpoint = self._endpoint()
                settings = self._settings
                wire = Wire(
                    endpoint, max_connections=settings.max_connections, acquire_timeout_s=settings.deadline_s
                )
                self._policy = settings.policy(real_server=endpoint.real_server)
                check = upkeep.connect(
                    self._ns, real_server=endpoint.real_server, allow_eviction=settings.allow_eviction
                )
                try:
                    self._drive(wire, check)
                except BaseException:
                    wire.close()
                    raise
                self._wire = wire
            return self._wire

    def close(self) -> None:
        """Close the connections. The next use opens new ones."""
        with self._connecting:
            wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- creating ---

    def create_managed(
        self,
        *,
        controller_id: str,
        goal: str,
        owner_session_key: str,
        requester_origin: str,
        current_step: str = "init",
        state: Any = None,  # noqa: ANN401 - the caller's
        flow_id: UUID | str | None = None,
        exist_ok: bool = False,
        op_id: str | None = None,
    ) -> Flow:
        """Create a flow: status created, revision 0.

        Args:
            controller_id, owner_session_key, requester_origin, current_step: 1 to 1,024 bytes each.
            goal: 1 to 65,536 bytes.
            state: any value that can be stored; `None` is an empty mapping.
            flow_id: a UUID of the caller's choice; by default a random one.
            exist_ok: return the owner's flow of that id if there is one.
            op_id: of an earlier call whose outcome is unknown.

        Raises:
            FlowExists: the id is taken.
        """
        return self._run(changes.create(self._ns, mirrored=False, controller_id=controller_id, goal=goal, owner_session_key=owner_session_key, requester_origin=requester_origin, current_step=current_step, state=state, flow_id=flow_id, exist_ok=exist_ok, op_id=op_id))

    def create_mirrored(
        self,
        *,
        controller_id: str,
        goal: str,
        owner_session_key: str,
        requester_origin: str,
        current_step: str = "init",
        state: Any = None,  # noqa: ANN401 - the caller's
        flow_id: UUID | str | None = None,
        exist_ok: bool = False,
        op_id: str | None = None,
    ) -> Flow:
        """Create a flow for work that already runs elsewhere: status running, revision 1, two events.

        Takes and raises what `create_managed` does.
        """
        return self._run(changes.create(self._ns, mirrored=True, controller_id=controller_id, goal=goal, owner_session_key=owner_session_key, requester_origin=requester_origin, current_step=current_step, state=state, flow_id=flow_id, exist_ok=exist_ok, op_id=op_id))

    # --- reading ---

    def get(self, flow_id: FlowRef) -> Flow | None:
        """Read one flow; `None` if there is none."""
        return self._run(reads.get(self._ns, flow_id))

    def get_many(self, flow_ids: Iterable[FlowRef]) -> list[Flow | None]:
        """Read flows by id, in the order given; `None` for each there is not."""
        return self._run(reads.get_many(self._ns, flow_ids))

    def list_by_owner(self, owner: str, *, limit: int | None = None) -> list[Flow]:
        """The flows of an owner, newest first. A damaged flow is left out and logged."""
        return self._run(reads.list_flows(reads.Listing(self._ns, owner=owner, limit=limit)))

    def list_by_status(
        self, status: FlowStatus | str, *, limit: int | None = None, updated_before: datetime | None = None
    ) -> list[Flow]:
        """The flows in a status, the longest unchanged first. A damaged flow is left out and logged.

        Args:
            status: a FlowStatus or its text.
            limit: how many at most; `None` for all, below 1 for none.
            updated_before: only flows last changed before this aware datetime: the quiet ones.
        """
        return self._run(reads.list_flows(reads.Listing(self._ns, status=status, limit=limit, updated_before=updated_before)))

    def iter_by_owner(self, owner: str, *, page: int = 500) -> Iterator[Flow]:
        """Every flow of an owner, newest first, `page` at a time in memory."""
        return self._pages(reads.Listing(self._ns, owner=owner, page=page))

    def iter_by_status(
        self, status: FlowStatus | str, *, page: int = 500, updated_before: datetime | None = None
    ) -> Iterator[Flow]:
        """Every flow in a status, the longest unchanged first, `page` at a time in memory.

        A flow that changes while this goes on may be missed where it was, and met where it went.
        """
        return self._pages(reads.Listing(self._ns, status=status, page=page, updated_before=updated_before))

    def count_by_status(self) -> dict[FlowStatus, int]:
        """How many flows are in each status."""
        return self._run(reads.count_by_status(self._ns))

    # --- the lifecycle ---

    def start_running(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Created or waiting → running.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.start_running(self._ns, flow, expected_revision=expected_revision, op_id=op_id))

    def set_waiting(
        self, flow: FlowRef, wait: AnyWait, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running → waiting, for a Timer, an ExternalEvent, a Manual, or a mapping of another kind.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.set_waiting(self._ns, flow, wait, expected_revision=expected_revision, op_id=op_id))

    def resume(
        self,
        flow: FlowRef,
        state_patch: Any = None,  # noqa: ANN401 - the caller's
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Waiting → running, the wait cleared and the patch merged into the state.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.resume(self._ns, flow, state_patch, expected_revision=expected_revision, op_id=op_id))

    def finish(
        self,
        flow: FlowRef,
        final_state: Any = None,  # noqa: ANN401 - the caller's
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Running → finished, the patch merged into the state.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.finish(self._ns, flow, final_state, expected_revision=expected_revision, op_id=op_id))

    def fail(
        self, flow: FlowRef, reason: str, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running or waiting → failed, with `state["failure"] = {"reason", "at"}`, `at` as RFC 3339 text.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.fail(self._ns, flow, reason, expected_revision=expected_revision, op_id=op_id))

    def request_cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Set the sticky cancel flag: from now on only `cancel` goes through.

        Changes nothing on a flow that has the flag or has ended.

        Raises:
            FlowNotFound, RevisionMismatch: in this order.
        """
        return self._run(changes.request_cancel(self._ns, flow, expected_revision=expected_revision, op_id=op_id))

    def cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Created, running or waiting → cancelled, whether or not it was requested.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal: in this order.
        """
        return self._run(changes.cancel(self._ns, flow, expected_revision=expected_revision, op_id=op_id))

    def update_state(
        self,
        flow: FlowRef,
        patch: Any = None,  # noqa: ANN401 - the caller's
        *,
        next_step: str | None = None,
        increment: Mapping[str, int] | None = None,
        unset: Iterable[str] = (),
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Merge into the state and move the step, in any live status; the status stays.

        Args:
            flow: the flow.
            patch: a mapping whose keys replace the state's, or a value that replaces the whole state.
            next_step: the new `current_step`.
            increment: what to add to top-level integers of the state; an absent one counts as 0.
            unset: top-level keys to remove.
            expected_revision: refuse if the flow has another.
            op_id: of an earlier call whose outcome is unknown.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending: in this order.
            InvalidData: also for an increment of what is no integer, or beyond 64 bits.
        """
        return self._run(changes.update_state(self._ns, flow, patch, next_step=next_step, increment=increment, unset=unset, expected_revision=expected_revision, op_id=op_id))

    def update_and_append(
        self,
        flow: Flow,
        kind: str,
        payload: Any = None,  # noqa: ANN401 - the caller's
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> tuple[Flow, FlowEvent]:
        """Write step, state, status, wait and cancel flag of `flow`, if it is still the stored version.

        The primitive under the verbs, for `attrs.evolve(flow, …)`: the same guards apply.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.update_and_append(self._ns, flow, kind, payload, expected_revision=expected_revision, op_id=op_id))

    def mutate(
        self,
        flow_id: FlowRef,
        fn: Callable[[Flow], Flow],
        *,
        kind: str,
        payload: Any = None,  # noqa: ANN401 - the caller's
        retries: int = 8,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Read, apply `fn`, compare and write; again from the read, up to `retries` times, when another writer won.

        Args:
            flow_id: the flow.
            fn: takes the flow as read, returns it changed, as by `attrs.evolve`; called once per try.
            kind, payload: of the event.
            retries: tries after the first.
            expected_revision: change only this version: never tries again.
            op_id: of an earlier call whose outcome is unknown.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self._run(changes.mutate(self._ns, flow_id, fn, kind=kind, payload=payload, retries=retries, expected_revision=expected_revision, op_id=op_id))

    # --- records ---

    def append_event(
        self,
        flow_id: FlowRef,
        kind: str,
        payload: Any = None,  # noqa: ANN401 - the caller's
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> FlowEvent:
        """Append an audit entry alone, whatever the status; the revision stays.

        Raises:
            FlowNotFound, RevisionMismatch: in this order.
        """
        return self._run(records.append_event(self._ns, flow_id, kind, payload, expected_revision=expected_revision, op_id=op_id))

    def list_events(self, flow_id: FlowRef, limit: int | None = 100) -> list[FlowEvent]:
        """The last `limit` events, newest first; none for a limit below 1, all for `None`."""
        return self._run(records.list_events(self._ns, flow_id, limit))

    def iter_events(self, flow_id: FlowRef, *, after: str | None = None) -> Iterator[FlowEvent]:
        """Every event, oldest first; with `after`, those behind that event id."""
        return self._pages(records.Trail(self._ns, flow_id, after))

    def record_step_observation(
        self,
        observation: StepObservation,
        *,
        runtime: StepRuntime | str = StepRuntime.MIRRORED,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> FlowStep:
        """Insert or update the step `(flow_id, run_id)`, whatever the flow's status; the revision stays.

        Raises:
            FlowNotFound, RevisionMismatch: in this order.
        """
        return self._run(records.record_step_observation(self._ns, observation, runtime=runtime, expected_revision=expected_revision, op_id=op_id))

    def list_steps(self, flow_id: FlowRef) -> list[FlowStep]:
        """Every step of a flow, oldest first."""
        return self._run(records.list_steps(self._ns, flow_id))

    def find_step_by_run_id(self, flow_id: FlowRef, run_id: str) -> FlowStep | None:
        """One step of a flow; `None` if that run was never observed."""
        return self._run(records.find_step_by_run_id(self._ns, flow_id, run_id))

    # --- following ---

    def watch(self, flow_id: FlowRef, *, after: str | None = None, timeout: float | None = None) -> Iterator[FlowEvent]:
        """Yield events as they happen, on a connection of its own; ends at the one that ends the flow.

        Args:
            flow_id: the flow.
            after: the id of the last event not wanted; by default, events from now on.
            timeout: seconds after which it ends anyway; `None` for never.

        Raises:
            FlowNotFound: also when the flow is deleted meanwhile.
        """
        return self._pages(follow.Watch(self._ns, flow_id, after, timeout))

    def wait_for(self, flow_id: FlowRef, *statuses: FlowStatus | str, timeout: float | None = None) -> Flow:
        """Wait until the flow is in one of `statuses`; by default, until it has ended.

        A status that the flow only passes through between two looks may be missed.

        Raises:
            TimeoutError: not within `timeout` seconds.
            AlreadyTerminal: it has ended otherwise, and never will be.
            FlowNotFound: there is none.
        """
        return self._run(follow.wait_for(self._ns, flow_id, statuses, timeout))

    # --- upkeep ---

    def delete(self, flow_id: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> bool:
        """Delete a flow, live or not, with every key of its. Returns whether there was one.

        Raises:
            RevisionMismatch: it is not the version expected.
        """
        return self._run(upkeep.delete(self._ns, flow_id, expected_revision=expected_revision, op_id=op_id))

    def prune_terminal_flows(self, older_than: timedelta) -> int:
        """Delete ended flows that have not changed for `older_than`, never a live one. Returns how many."""
        return self._run(upkeep.prune_terminal_flows(self._ns, older_than))
