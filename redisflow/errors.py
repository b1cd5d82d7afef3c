"""The exception tree.

FlowError
├── FlowNotFound         no such flow, or not one the caller may see
├── FlowExists           the id is taken
├── RevisionMismatch     the flow moved on since it was read
├── IllegalTransition    the lifecycle has no such step
├── AlreadyTerminal      the flow has ended
├── CancelPending        a cancel was requested; only `cancel` may follow
├── InvalidData          a value that cannot be stored, or stored bytes that make no sense
├── LayoutMismatch       the namespace was created with another layout
├── PartialFailure       a call about many flows failed for some of them
└── StorageError         the server could not be reached or refused; nothing was changed
    ├── OutcomeUnknown   the change may or may not have been applied
    └── NotDurable       applied, but not confirmed by as many replicas as asked

Every error carries its facts as attributes and builds its own message from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from redisflow.flow import Flow, FlowStatus

_SHOWN = 100


def shown(value: object) -> str:
    """Return the `repr` of a caller's value for a message: cut short, and in its place the type where it fails."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - too many digits, too deep, or the caller's own: the refusal must not be lost
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class FlowError(Exception):
    """Base of everything this library raises on its own account."""

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes: messages are built from attributes, not from `args`."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[FlowError], args: tuple[object, ...], facts: dict[str, object]) -> FlowError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


class FlowNotFound(FlowError):
    """No flow has this id, as far as the caller may see."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        super().__init__(f"flow {flow_id} does not exist")


class FlowExists(FlowError):
    """The id given for a new flow is taken."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        super().__init__(f"flow {flow_id} exists already; pass exist_ok=True to get it, or choose another id")


class RevisionMismatch(FlowError):
    """The flow is no longer the version the caller meant to change."""

    def __init__(self, flow_id: UUID, expected: int, actual: int) -> None:
        self.flow_id = flow_id
        self.expected = expected
        self.actual = actual
        # Equal numbers and yet another version: a failover lost writes and the number was used again.
        found = f"is at revision {actual}" if expected != actual else "is another writer's under that revision"
        super().__init__(f"flow {flow_id} {found}, expected {expected}; read it again before changing it")


class IllegalTransition(FlowError):
    """The lifecycle has no step from `source` to `target`."""

    def __init__(self, flow_id: UUID, source: FlowStatus, target: FlowStatus) -> None:
        self.flow_id = flow_id
        self.source = source
        self.target = target
        allowed = ", ".join(sorted(source.targets)) or "nothing"
        super().__init__(f"flow {flow_id} is {source} and cannot become {target}; it can become {allowed}")


class AlreadyTerminal(FlowError):
    """The flow has ended and does not change any more."""

    def __init__(self, flow_id: UUID, status: FlowStatus) -> None:
        self.flow_id = flow_id
        self.status = status
        super().__init__(f"flow {flow_id} has ended as {status} and cannot change")


class CancelPending(FlowError):
    """A cancel was requested: the flow can only be cancelled now."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        super().__init__(f"flow {flow_id} has a cancel pending; stop its work and call cancel()")


class InvalidData(FlowError):
    """A value that cannot be stored, or stored bytes that make no sense."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class LayoutMismatch(FlowError):
    """The namespace was created with another layout than this client uses."""

    def __init__(self, prefix: str, what: str, expected: int, actual: int) -> None:
        self.prefix = prefix
        self.what = what
        self.expected = expected
        self.actual = actual
        super().__init__(
            f"namespace {prefix!r} has {what} {actual}, this client uses {expected}: "
            "use what the namespace was created with, or another prefix"
        )


class FlowFailure(NamedTuple):
    """One flow that a call about many flows failed for.

    Attributes:
        place: its place among the flows of the call, from 0; of `create_many`, among the inputs.
        flow_id: its id.
        error: what that flow's own call would have raised. An OutcomeUnknown or NotDurable carries the `op_id` by which
            the single verb settles it.
    """

    place: int
    flow_id: UUID
    error: FlowError


class PartialFailure(FlowError):
    """A call about many flows failed for some of them. It was tried for each.

    Attributes:
        count: how many flows it succeeded for.
        done: those flows, as they are now; empty for a deletion.
        failed: the others, each with its error.
    """

    def __init__(self, failed: Sequence[FlowFailure], *, done: Sequence[Flow] = (), count: int | None = None) -> None:
        self.count = len(done) if count is None else count
        self.done = list(done)
        self.failed = list(failed)
        others = f"; and {len(failed) - 1} more, see `failed`" if len(failed) > 1 else ""
        first = f"flow {failed[0].flow_id}: {failed[0].error}"
        super().__init__(f"done for {self.count} of {self.count + len(failed)} flows; {first}{others}")


class StorageError(FlowError):
    """The server could not be reached, or refused. Nothing was changed by this call.

    The client library's own error, where there is one, is the `__cause__`.

    Attributes:
        code: the first word of the server's error, such as NOPERM; empty where the server said nothing.
        lasting: whether trying again is of no use, as with a wrong password or a missing permission.
    """

    def __init__(self, message: str, code: str = "", *, lasting: bool = False) -> None:
        self.code = code
        self.lasting = lasting
        super().__init__(message)


class OutcomeUnknown(StorageError):
    """The change may or may not have been applied.

    The same verb called with `op_id=error.op_id` settles it: applied already, it answers as it would have;
    not applied, it is applied now.
    """

    def __init__(self, op_id: str, reason: str = "the reply was lost and the server did not come back") -> None:
        self.op_id = op_id
        super().__init__(f"outcome unknown: {reason}; call again with op_id={op_id!r} to settle it")


class NotDurable(StorageError):
    """Applied, but fewer replicas confirmed it than were asked for.

    The same verb called with `op_id=error.op_id` changes nothing more, and waits for the replicas once more.
    """

    def __init__(self, op_id: str, flow: Flow | None, wanted: int, reached: int) -> None:
        self.op_id = op_id
        self.flow = flow
        self.wanted = wanted
        self.reached = reached
        subject = f"the change to flow {flow.id}" if flow is not None else "the change"
        super().__init__(
            f"{subject} was applied, but {reached} of {wanted} replicas confirmed it in time; "
            f"call again with op_id={op_id!r} to wait once more"
        )
