"""The sync manager.

Every method is one line: it hands an operation of `redisflow.ops` to be carried out. Each rule stands there, or
in a script, once; `redisflow.aio.AsyncFlowManager` has the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import UUID

import redis
from redis.cluster import RedisCluster

from redisflow.batch import FlowBatch
from redisflow.calls import Op, Pages, T
from redisflow.cluster_wire import ClusterWire
from redisflow.connection import ClusterEndpoint, Endpoint, endpoint_of, taken_from, url_of
from redisflow.delivery import deliver
from redisflow.diagnosis import Diagnosis
from redisflow.flow import Flow, FlowEvent, FlowRef, FlowStatus, FlowStep, NewFlow, StepObservation, StepRuntime
from redisflow.link import Link, LinkView, drive, view_of
from redisflow.ops import batches, changes, creation, doctor, follow, reads, records, rewriting, upkeep
from redisflow.settings import Settings
from redisflow.waits import AnyWait
from redisflow.wire import Wire


class FlowManager:
    """Flows in one namespace of a server or a cluster.

    Safe to share between threads; after a fork the child opens connections of its own. Nothing is sent before
    the first use, or `with`. Every changing verb takes a Flow, a UUID or its text; with a Flow whose copy is
    current the reply is two numbers. `expected_revision` makes it a compare; `op_id` settles an earlier call
    whose outcome is unknown.

    Every method may raise:
        InvalidData: bad input, before anything is sent; or stored bytes that make no sense.
        StorageError: the server cannot be reached or refuses; nothing was changed.
        OutcomeUnknown: a change may or may not have been applied before the deadline.
        NotDurable: a change was applied, and fewer replicas confirmed it than `durability` asks for.
    """

    def __init__(self, client: redis.Redis | RedisCluster, prefix: str = "redisflow", **options: Any) -> None:
        """Use the server of a client.

        Args:
            client: a `redis.Redis` or a `redis.RedisCluster`. Its settings are taken; its connections are not, because
                it resends by itself.
            prefix: the namespace.
            **options: see `redisflow.settings.Settings`.
        """
        endpoint = taken_from(client, "FlowManager", (redis.Redis, RedisCluster))
        self._set_up(lambda: endpoint, Settings(prefix=prefix, **options))

    @classmethod
    def from_url(cls, url: str | None = None, *, prefix: str = "redisflow", **options: Any) -> Self:
        """Use the server at a URL.

        Args:
            url: `redis://`, `unix://`, `redis+cluster://`, `redis+sentinel://`, the same over TLS with `rediss`,
                `memory://`, `embedded://`; by default `$REDISFLOW_URL`, or `redis://localhost:6379/0`.
            prefix: the namespace.
            **options: see `redisflow.settings.Settings`.
        """
        checked = url_of(url)
        manager = cls.__new__(cls)
        manager._set_up(lambda: endpoint_of(checked, is_async=False), Settings(prefix=prefix, **options))  # noqa: SLF001 - the other constructor
        return manager

    def _set_up(self, endpoint: Callable[[], Endpoint | ClusterEndpoint], settings: Settings) -> None:
        self.namespace = settings.namespace()
        self._link: Link | LinkView = Link(endpoint, settings)
        self._is_view = False

    # --- carrying out operations ---

    def perform(self, op: Op[T]) -> T:
        """Carry out an operation of `redisflow.ops`, and return what it returns."""
        link = self._link
        wire = link.wire or self.connect()
        return drive(wire, deliver(op, link.policy))

    def _pages(self, pages: Pages[T]) -> Iterator[T]:
        while (page := self.perform(pages.next_page())) is not None:
            yield from page

    def connect(self) -> Wire | ClusterWire:
        """Connect and check the server and the namespace now; otherwise the first use does.

        Raises:
            LayoutMismatch: the namespace was created with another layout.
        """
        return self._link.connect(self.namespace)

    def close(self) -> None:
        """Close the connections. The next use opens new ones. A view's are left to the manager it came from."""
        if not self._is_view:
            self._link.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def for_owner(self, owner: str) -> Self:
        """A view of one owner's flows: other owners' are to it as if they did not exist.

        It creates under that owner, lists, counts and prunes only that owner's flows, and finds no others. It
        shares the connection: closing it closes nothing.

        Args:
            owner: the flows' `owner_session_key`.

        Raises:
            InvalidData: this is a view of another owner's.
        """
        return view_of(self, namespace=self.namespace.for_owner(owner))

    def with_durability(self, durability: str) -> Self:
        """A view whose changes succeed when so many replicas have them, as in `with_durability("all").finish(flow)`.

        It shares the connection: closing it closes nothing.

        Args:
            durability: `local`, `replicas:N` or `all`, as the option of the same name.

        Raises:
            InvalidData: none of these.
        """
        return view_of(self, _link=self._link.confirming(durability))

    # --- creating ---

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
    ) -> Flow:
        """Create a flow: status created, revision 0.

        Args:
            controller_id, owner_session_key, requester_origin, current_step: 1 to 1,024 bytes each; the owner may be
                left out of a view's call, and cannot be another than the view's.
            goal: 1 to 65,536 bytes.
            state: any value that can be stored; `None` is an empty mapping.
            flow_id: a UUID of the caller's choice; by default a random one.
            exist_ok: return the owner's flow of that id if there is one.
            op_id: of an earlier call whose outcome is unknown.

        Raises:
            FlowExists: the id is taken.
        """
        return self.perform(
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
    ) -> Flow:
        """Create a flow for work that already runs elsewhere: status running, revision 1, two events.

        Takes and raises what `create_managed` does.
        """
        return self.perform(
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

    def create_many(self, inputs: Iterable[NewFlow], *, exist_ok: bool = False) -> list[Flow]:
        """Create flows, each as by `create_managed`, many to a round trip.

        Args:
            inputs: checked, all of them, before the first is sent.
            exist_ok: return the owner's flow of an id that is taken.

        Returns:
            The flows, in the order given.

        Raises:
            PartialFailure: some could not be created, such as one whose id is taken; the error names each, and has the
                others, which were created.
        """
        return self.perform(batches.create_many(self.namespace, inputs, exist_ok=exist_ok))

    # --- reading ---

    def get(self, flow_id: FlowRef) -> Flow | None:
        """Read one flow; `None` if there is none."""
        return self.perform(reads.get(self.namespace, flow_id))

    def get_many(self, flow_ids: Iterable[FlowRef]) -> list[Flow | None]:
        """Read flows by id, in the order given; `None` for each there is not."""
        return self.perform(reads.get_many(self.namespace, flow_ids))

    def list_by_owner(self, owner: str, *, limit: int | None = None) -> list[Flow]:
        """The flows of an owner, newest first. A damaged flow is left out and logged."""
        return self.perform(reads.list_by_owner(self.namespace, owner, limit))

    def list_by_status(
        self, status: FlowStatus | str, *, limit: int | None = None, updated_before: datetime | None = None
    ) -> list[Flow]:
        """The flows in a status, the longest unchanged first. A damaged flow is left out and logged.

        Args:
            status: a FlowStatus or its text.
            limit: how many at most; `None` for all, below 1 for none.
            updated_before: only flows last changed before this aware datetime: the quiet ones.
        """
        return self.perform(reads.list_by_status(self.namespace, status, limit, updated_before))

    def iter_by_owner(self, owner: str, *, page: int = 500) -> Iterator[Flow]:
        """Every flow of an owner, newest first, `page` at a time in memory."""
        return self._pages(reads.Listing.of_owner(self.namespace, owner, page))

    def iter_by_status(
        self, status: FlowStatus | str, *, page: int = 500, updated_before: datetime | None = None
    ) -> Iterator[Flow]:
        """Every flow in a status, the longest unchanged first, `page` at a time in memory.

        A flow that changes while this goes on may be missed; none is met twice.
        """
        return self._pages(reads.Listing.of_status(self.namespace, status, updated_before, page))

    def count_by_status(self) -> dict[FlowStatus, int]:
        """How many flows are in each status."""
        return self.perform(reads.count_by_status(self.namespace))

    # --- the lifecycle ---

    def start_running(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Created or waiting → running.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            changes.start_running(self.namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    def set_waiting(
        self, flow: FlowRef, wait: AnyWait, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running → waiting, for a Timer, an ExternalEvent, a Manual, or a mapping of another kind.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            changes.set_waiting(self.namespace, flow, wait, expected_revision=expected_revision, op_id=op_id)
        )

    def resume(
        self,
        flow: FlowRef,
        state_patch: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Created or waiting → running, the wait cleared and the patch merged into the state.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            changes.resume(self.namespace, flow, state_patch, expected_revision=expected_revision, op_id=op_id)
        )

    def finish(
        self,
        flow: FlowRef,
        final_state: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> Flow:
        """Running → finished, the patch merged into the state.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            changes.finish(self.namespace, flow, final_state, expected_revision=expected_revision, op_id=op_id)
        )

    def fail(
        self, flow: FlowRef, reason: str, *, expected_revision: int | None = None, op_id: str | None = None
    ) -> Flow:
        """Running or waiting → failed, with `state["failure"] = {"reason", "at"}`, `at` as RFC 3339 text.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            changes.fail(self.namespace, flow, reason, expected_revision=expected_revision, op_id=op_id)
        )

    def request_cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Set the sticky cancel flag: from now on only `cancel` goes through.

        Changes nothing on a flow that has the flag or has ended.

        Raises:
            FlowNotFound, RevisionMismatch: in this order.
        """
        return self.perform(
            changes.request_cancel(self.namespace, flow, expected_revision=expected_revision, op_id=op_id)
        )

    def cancel(self, flow: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> Flow:
        """Created, running or waiting → cancelled, whether or not it was requested.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal: in this order.
        """
        return self.perform(changes.cancel(self.namespace, flow, expected_revision=expected_revision, op_id=op_id))

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
        return self.perform(
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

    def update_and_append(
        self,
        flow: Flow,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> tuple[Flow, FlowEvent]:
        """Write step, state, status, wait and cancel flag of `flow`, if it is still the stored version.

        The primitive under the verbs, for `attrs.evolve(flow, …)`: the same guards apply.

        Raises:
            FlowNotFound, RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition: in this order.
        """
        return self.perform(
            rewriting.update_and_append(
                self.namespace, flow, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    def mutate(
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
        return self.perform(
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

    def batch(self) -> FlowBatch:
        """Queue verbs in a `with` block and send them together, 500 to a round trip."""
        self.connect()
        return FlowBatch(self)

    # --- records ---

    def append_event(
        self,
        flow_id: FlowRef,
        kind: str,
        payload: Any = None,
        *,
        expected_revision: int | None = None,
        op_id: str | None = None,
    ) -> FlowEvent:
        """Append an audit entry alone, whatever the status; the revision stays.

        Raises:
            FlowNotFound, RevisionMismatch: in this order.
        """
        return self.perform(
            records.append_event(
                self.namespace, flow_id, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        )

    def list_events(self, flow_id: FlowRef, limit: int | None = 100) -> list[FlowEvent]:
        """The last `limit` events, newest first; none for a limit below 1, all for `None`."""
        return self.perform(records.list_events(self.namespace, flow_id, limit))

    def iter_events(self, flow_id: FlowRef, *, after: str | None = None) -> Iterator[FlowEvent]:
        """Every event, oldest first; with `after`, those behind that event id."""
        return self._pages(records.Trail(self.namespace, flow_id, after))

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
        return self.perform(
            records.record_step_observation(
                self.namespace, observation, runtime=runtime, expected_revision=expected_revision, op_id=op_id
            )
        )

    def list_steps(self, flow_id: FlowRef) -> list[FlowStep]:
        """Every step of a flow, oldest first."""
        return self.perform(records.list_steps(self.namespace, flow_id))

    def find_step_by_run_id(self, flow_id: FlowRef, run_id: str) -> FlowStep | None:
        """One step of a flow; `None` if that run was never observed."""
        return self.perform(records.find_step_by_run_id(self.namespace, flow_id, run_id))

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
        return self._pages(follow.Watch(self.namespace, flow_id, after, timeout))

    def wait_for(self, flow_id: FlowRef, *statuses: FlowStatus | str, timeout: float | None = None) -> Flow:
        """Wait until the flow is in one of `statuses`; by default, until it has ended.

        A status that the flow only passes through between two looks may be missed.

        Raises:
            TimeoutError: not within `timeout` seconds.
            AlreadyTerminal: it has ended otherwise, and never will be.
            FlowNotFound: there is none.
        """
        return self.perform(follow.wait_for(self.namespace, flow_id, statuses, timeout))

    # --- upkeep ---

    def delete(self, flow_id: FlowRef, *, expected_revision: int | None = None, op_id: str | None = None) -> bool:
        """Delete a flow, ended or not, and all its keys. Returns whether there was one.

        For an hour, the same `op_id` is answered with True again, and nothing that was meant for the deleted flow is
        applied to one that is created anew under its id.

        Raises:
            RevisionMismatch: it is not the version expected.
        """
        return self.perform(upkeep.delete(self.namespace, flow_id, expected_revision=expected_revision, op_id=op_id))

    def prune_terminal_flows(self, older_than: timedelta) -> int:
        """Delete ended flows that have not changed for `older_than`, never a live one. Returns how many.

        Raises:
            PartialFailure: some could not be deleted; it stops after their page, which holds 500 flows.
        """
        return self.perform(upkeep.prune_terminal_flows(self.namespace, older_than))

    def doctor(self, *, repair: bool = False, quiet_after: timedelta = timedelta(days=1)) -> Diagnosis:
        """Examine the server, the namespace and everything in it, a page at a time; the store may be in use.

        Args:
            repair: mend what loses nothing by it: index entries, and records of flows that do not exist.
            quiet_after: how long a running flow may stay unchanged before it is mentioned.
        """
        return self.perform(doctor.doctor(self.namespace, repair=repair, quiet_after=quiet_after))
