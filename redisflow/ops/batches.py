"""Operations side by side: each one's next call travels with those of the others."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, Generic

from redisflow.calls import Batch, Call, Op, T, Unconfirmed
from redisflow.errors import FlowError, FlowFailure, InvalidData, PartialFailure
from redisflow.flow import Flow, NewFlow
from redisflow.ops.changes import OTHER_KEYS
from redisflow.ops.creation import create
from redisflow.ops.namespace import Namespace


class Queued(Generic[T]):
    """What a verb of a batch comes to."""

    def __init__(self, op: Op[T]) -> None:
        """Take the operation as far as its first call: bad input is refused here."""
        self._op = op
        call: Call = next(op)
        self.call: Call | None = call
        self.flow_id = call.flow_id
        self._error: FlowError | None = None
        self._short: Unconfirmed | None = None
        self._value: T

    def result(self) -> T:
        """What the verb returns, or the verb's own error raised.

        Raises:
            RuntimeError: the batch was not sent, not yet, or not to the end.
        """
        if self.call is not None:
            raise RuntimeError(
                f"{self.call.subject}: its batch was not sent to the end; results are there behind the `with` block"
            )
        if self._error is not None:
            raise self._error
        return self._value

    def widen(self) -> None:
        """Have the call take the flow in whatever status it will be, where it is for that of the caller's copy."""
        if self.call is not None and self.call.narrow:
            self.call = self._op.send(OTHER_KEYS)

    def take(self, outcome: Any) -> None:
        """Go on with what the call came to."""
        if isinstance(outcome, Unconfirmed):
            self._short, outcome = outcome, outcome.reply
        op_id = "" if self.call is None else self.call.op_id
        try:
            self.call = self._op.throw(outcome) if isinstance(outcome, FlowError) else self._op.send(outcome)
        except StopIteration as stop:
            self.call, self._value = None, stop.value
            if self._short is not None:
                self._error = self._short.error(stop.value, op_id)
        except FlowError as error:
            self.call, self._error = None, error


def carry_out(queued: Sequence[Queued[Any]]) -> Generator[Batch, Any, None]:
    """Send what is queued, in its order, until each has come to something."""
    while waiting := [(one, one.call) for one in queued if one.call is not None]:
        outcomes = yield Batch([call for _, call in waiting], confirm=True)
        for (one, _), outcome in zip(waiting, outcomes, strict=True):
            one.take(outcome)


def create_many(
    namespace: Namespace, inputs: Iterable[NewFlow], *, exist_ok: bool
) -> Generator[Batch, Any, list[Flow]]:
    """Create flows. Every input is checked before the first is sent."""
    queued = []
    for place, new in enumerate(inputs):
        if not isinstance(new, NewFlow):
            raise InvalidData(f"inputs[{place}]: expected a NewFlow, not {type(new).__name__}; nothing was created")
        try:
            queued.append(Queued(_creating(namespace, new, exist_ok=exist_ok)))
        except InvalidData as error:
            raise InvalidData(f"inputs[{place}]: {error}; nothing was created") from None
    yield from carry_out(queued)
    created: list[Flow] = []
    failed: list[FlowFailure] = []
    for place, one in enumerate(queued):
        try:
            created.append(one.result())
        except FlowError as error:
            failed.append(FlowFailure(place, one.flow_id, error))
    if failed:
        raise PartialFailure(failed, done=created)
    return created


def _creating(namespace: Namespace, new: NewFlow, *, exist_ok: bool) -> Op[Flow]:
    return create(
        namespace,
        mirrored=False,
        controller_id=new.controller_id,
        goal=new.goal,
        owner_session_key=new.owner_session_key,
        requester_origin=new.requester_origin,
        current_step=new.current_step,
        state=new.state,
        flow_id=new.flow_id,
        exist_ok=exist_ok,
        op_id=None,
    )
