"""Flows, their steps and events, and the lifecycle: the one transition table everything else is driven by."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import UUID

import attrs

from redisflow.errors import InvalidData
from redisflow.waits import ExternalEvent, Manual, Timer, parse_wait


class FlowStatus(enum.StrEnum):
    """Where a flow stands in its life."""

    CREATED = "created"
    RUNNING = "running"
    WAITING = "waiting"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def targets(self) -> frozenset[FlowStatus]:
        """The statuses a flow may go to from here."""
        return TRANSITIONS[self]

    @property
    def is_terminal(self) -> bool:
        """Whether a flow in this status has ended."""
        return not TRANSITIONS[self]

    def can_transition_to(self, other: FlowStatus) -> bool:
        """Whether the lifecycle has a step from here to `other`."""
        return other in TRANSITIONS[self]


TRANSITIONS: dict[FlowStatus, frozenset[FlowStatus]] = {
    FlowStatus.CREATED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
    FlowStatus.RUNNING: frozenset({FlowStatus.WAITING, FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED}),
    FlowStatus.WAITING: frozenset({FlowStatus.RUNNING, FlowStatus.FAILED, FlowStatus.CANCELLED}),
    FlowStatus.FINISHED: frozenset(),
    FlowStatus.FAILED: frozenset(),
    FlowStatus.CANCELLED: frozenset(),
}
TERMINAL = tuple(status for status in FlowStatus if status.is_terminal)


class FlowStepStatus(enum.StrEnum):
    """How the observed work of a step stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepRuntime(enum.StrEnum):
    """Who runs a step: this fleet (`managed`), or something it only watches (`mirrored`)."""

    MANAGED = "managed"
    MIRRORED = "mirrored"


@attrs.frozen(eq=False)  # each is one constant: looked up by identity
class Verb:
    """One row of the lifecycle: what the transition script is made from.

    Attributes:
        kind: the event it appends; empty where the caller names it.
        target: the status it leads to; `None` leaves the status as it is.
        in_place: whether a flow that is in `target` already may stay there.
        when_cancel_pending: `refuse` raises CancelPending, `allow` goes on, `ignore` changes nothing.
        when_terminal: `refuse` raises AlreadyTerminal, `ignore` changes nothing.
        allow_oom: goes on working when the server is out of memory, so that work can be ended.
        takes: the arguments it has beside those of every verb, see lua/transition.lua.
    """

    kind: str
    target: FlowStatus | None
    in_place: bool = False
    when_cancel_pending: Literal["refuse", "allow", "ignore"] = "refuse"
    when_terminal: Literal["refuse", "ignore"] = "refuse"
    allow_oom: bool = False
    takes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[FlowStatus, ...]:
        """The statuses it may start from."""
        return tuple(status for status in FlowStatus if not status.is_terminal and self._starts_from(status))

    def _starts_from(self, status: FlowStatus) -> bool:
        if self.target is None or (self.in_place and status is self.target):
            return True
        return status.can_transition_to(self.target)


_DELTAS = ("n_unset", "n_increment")
_NEW_WAIT = ("due_at", "waiter")

START_RUNNING = Verb("started", FlowStatus.RUNNING)
SET_WAITING = Verb("waiting", FlowStatus.WAITING, takes=_NEW_WAIT)
RESUME = Verb("resumed", FlowStatus.RUNNING, allow_oom=True, takes=("merge",))
FINISH = Verb("finished", FlowStatus.FINISHED, allow_oom=True, takes=("merge",))
FAIL = Verb("failed", FlowStatus.FAILED, allow_oom=True, takes=("merge", "stamp_field", "stamp_head", "stamp_tail"))
CANCEL = Verb("cancelled", FlowStatus.CANCELLED, when_cancel_pending="allow", allow_oom=True)
REQUEST_CANCEL = Verb(
    "cancel_requested",
    None,
    when_cancel_pending="ignore",
    when_terminal="ignore",
    allow_oom=True,
    takes=("wake",),
)
UPDATE_STATE = Verb("state_updated", None, takes=("merge",))
UPDATE_DELTAS = Verb("state_updated", None, takes=("merge", *_DELTAS))
VERBS = (START_RUNNING, SET_WAITING, RESUME, FINISH, FAIL, CANCEL, REQUEST_CANCEL, UPDATE_STATE, UPDATE_DELTAS)

# What `update_and_append` runs, by the status of the flow it is given.
REWRITES = {
    status: Verb(
        "",
        status,
        in_place=True,
        when_cancel_pending="allow" if status is FlowStatus.CANCELLED else "refuse",
        takes=("kind", "merge", *_DELTAS, *_NEW_WAIT, "wake"),
    )
    for status in FlowStatus
}


class Stored(Protocol):
    """The stored form of a flow: decodes one attribute when it is asked for."""

    def read(self, name: str) -> Any:
        """Decode the attribute `name`."""


@attrs.frozen(kw_only=True)
class Flow:
    """One version of a flow, as it was read.

    `state` is the caller's copy: writing into it changes nothing that is stored. To store an altered flow,
    pass `attrs.evolve(flow, …)` to `update_and_append`.

    Attributes:
        wait: the wire mapping of what a waiting flow waits for, else `None`; `condition` is it parsed.
        revision: 0 at creation, one more at every change.
        etag: the id of the operation that made this version; unlike a revision, never another's.
        created_at, updated_at: the server's time, UTC, to the microsecond.
    """

    id: UUID
    controller_id: str
    goal: str
    owner_session_key: str
    requester_origin: str
    current_step: str
    state: Any
    wait: Mapping[str, Any] | None
    status: FlowStatus
    cancel_requested: bool
    revision: int
    etag: str
    created_at: datetime
    updated_at: datetime
    # What was read, whatever the caller makes of the rest: evolve() carries it along.
    _base: Stored | None = attrs.field(default=None, eq=False, repr=False)

    if not TYPE_CHECKING:  # a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Decode an attribute when it is first looked at."""
            if name in _ATTRIBUTES and self._base is not None:
                value = self._base.read(name)
                object.__setattr__(self, name, value)
                return value
            raise AttributeError(name)

    @property
    def condition(self) -> Timer | ExternalEvent | Manual | None:
        """`wait` parsed; `None` when the flow waits for nothing, or for something of the caller's own.

        Raises:
            InvalidData: what is stored there is no wait.
        """
        try:
            return None if self.wait is None else parse_wait(self.wait)
        except InvalidData as error:
            raise InvalidData(f"flow {self.id}: {error}") from None

    @classmethod
    def from_stored(cls, stored: Stored) -> Flow:
        """Make a flow that decodes what is looked at."""
        flow = cls.__new__(cls)
        object.__setattr__(flow, "_base", stored)
        return flow


# A flow as an argument: itself, its id, or the id as text.
FlowRef = Flow | UUID | str

_ATTRIBUTES = frozenset(field.name for field in attrs.fields(Flow)) - {"_base"}


@attrs.frozen(kw_only=True)
class NewFlow:
    """A flow to be created, as `create_many` takes it; the arguments of `create_managed`."""

    controller_id: str
    goal: str
    owner_session_key: str | None = None
    requester_origin: str
    current_step: str = "init"
    state: Any = None
    flow_id: UUID | str | None = None


@attrs.frozen(kw_only=True)
class FlowEvent:
    """One entry of a flow's audit trail.

    Attributes:
        id: the entry's stream id, `<milliseconds>-<sequence>`; ids of one flow only grow.
        revision: the flow's revision after the event.
        op_id: the operation that caused it.
        at: the server's time, UTC, to the millisecond.
    """

    id: str
    flow_id: UUID
    revision: int
    kind: str
    payload: Any
    at: datetime
    op_id: str = attrs.field(default="", repr=False)


@attrs.frozen(kw_only=True)
class FlowStep:
    """The last observation of one run of work that happens elsewhere."""

    id: UUID
    flow_id: UUID
    runtime: StepRuntime
    child_session_key: str | None
    run_id: str
    task: str
    status: FlowStepStatus
    result: Any
    created_at: datetime
    updated_at: datetime


@attrs.frozen
class StepObservation:
    """What was seen of a run: upserts the step `(flow_id, run_id)`.

    `child_session_key=None` keeps the key an earlier observation gave.
    """

    flow_id: UUID | str | Flow
    run_id: str
    task: str
    status: FlowStepStatus | str
    child_session_key: str | None = None
    result: Any = None
