"""What a wait engine does: resume what is due, answer external events."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Sequence
from datetime import datetime
from typing import Any

import attrs

from redisflow.calls import Batch, Read, Reply, Unconfirmed, command
from redisflow.codec import pack_plain, plain
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowFailure,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    PartialFailure,
    RevisionMismatch,
    StorageError,
)
from redisflow.flow import CANCEL, RESUME, Flow, FlowRef, FlowStatus, Verb
from redisflow.ops.changes import NO_CHANGE, OTHER_KEYS, Transition
from redisflow.ops.fields import TIMED_OUT, merging
from redisflow.ops.namespace import Namespace, Target, log, op_id_of, targets_of
from redisflow.ops.reads import get, read_sound
from redisflow.waits import ExternalEvent, from_us, require_aware, to_us

PAGE = 100
# Another engine, or the flow's own controller, was there first.
_LOST_RACES = (RevisionMismatch, AlreadyTerminal, CancelPending, IllegalTransition, FlowNotFound)


@attrs.frozen
class TickReport:
    """What one tick of an engine did.

    Attributes:
        scanned: due entries looked at.
        resumed: flows whose wait ended, resumed by this tick.
        cancelled: waiting flows whose cancel was requested, cancelled by this tick.
        still_waiting: flows of the namespace waiting after the tick.
        errors: flows that could not be handled; each is logged.
    """

    scanned: int = 0
    resumed: int = 0
    cancelled: int = 0
    still_waiting: int = 0
    errors: int = 0


@attrs.frozen
class Tick:
    """A report, and the seconds until something is due; `None` while nothing is."""

    report: TickReport
    next_due_s: float | None


def channels(namespace: Namespace) -> list[bytes]:
    """Where the scripts say that a wait has come to be the next that is due."""
    return [partition.due for partition in namespace.keyspace.partitions]


def tick(namespace: Namespace, now: datetime | None) -> Generator[Any, Any, Tick]:
    """Resume what is due at `now` (the server's time unless given), cancel what was asked to."""
    if namespace.owner:
        raise InvalidData("an engine ticks for every owner: make it of the manager, not of a view of one owner's flows")
    given_us = None if now is None else to_us(require_aware("now", now))
    partitions = namespace.keyspace.partitions
    (seconds, micros), *replies = yield Read(
        [
            command(None, b"TIME"),
            *(command(p, b"ZRANGE", p.due, 0, 0, b"WITHSCORES") for p in partitions),
            *(command(p, b"ZCARD", p.status(FlowStatus.WAITING)) for p in partitions),
        ]
    )
    server_us = int(seconds) * 1_000_000 + int(micros)
    now_us = server_us if given_us is None else given_us
    heads, waiting = [_entries(flat) for flat in replies[: len(partitions)]], sum(replies[len(partitions) :])
    later = [score for head in heads for _, score in head if score > now_us]
    # How many entries were looked at and stay, in the partitions that may have more of what is due.
    behind = {p: 0 for p, head in zip(partitions, heads, strict=True) if head and head[0][1] <= now_us}
    total = TickReport(still_waiting=waiting)
    while behind:
        pages = yield Read([command(p, b"ZRANGE", p.due, n, n + PAGE - 1, b"WITHSCORES") for p, n in behind.items()])
        entries = [_entries(flat) for flat in pages]
        due = [[member for member, score in page if score <= now_us] for page in entries]
        later += [score for page in entries for _, score in page if score > now_us]
        report, ended = yield from _handle(namespace, [m for page in due for m in page], from_us(now_us))
        total = _sum(total, report, ended=len(ended))
        behind = {
            p: n + sum(member not in ended for member in page)
            for (p, n), page in zip(behind.items(), due, strict=True)
            if len(page) == PAGE
        }
    return Tick(total, (min(later) - server_us) / 1_000_000 if later else None)


def _entries(flat: Sequence[bytes]) -> list[tuple[bytes, float]]:
    return list(zip(flat[::2], map(float, flat[1::2]), strict=True))


def _sum(total: TickReport, round_: TickReport, *, ended: int) -> TickReport:
    return TickReport(
        scanned=total.scanned + round_.scanned,
        resumed=total.resumed + round_.resumed,
        cancelled=total.cancelled + round_.cancelled,
        still_waiting=total.still_waiting - ended,
        errors=total.errors + round_.errors,
    )


def _handle(
    namespace: Namespace, members: Sequence[bytes], now: datetime
) -> Generator[Any, Any, tuple[TickReport, set[bytes]]]:
    """Resume or cancel flows that the index has as due. Returns also those that wait no more."""
    targets = targets_of(members)
    flows = yield from read_sound(namespace, targets, "a due flow cannot be handled", logging.ERROR)
    errors = len(members) - len(flows)
    endings = []
    for flow in flows:
        try:
            ending = _ending(namespace, flow, now)
        except InvalidData as error:  # its wait is none
            log.error("a due flow cannot be handled: %s", error)
            errors += 1
        else:
            endings += [] if ending is None else [ending]
    outcomes = (yield Batch([ending.call(namespace) for ending in endings])) if endings else []
    settled = [_settled(ending, outcome) for ending, outcome in zip(endings, outcomes, strict=True)]
    ended = {e.target.member for e, verb in zip(endings, settled, strict=True) if verb in {RESUME, CANCEL, _LOST}}
    report = TickReport(
        scanned=len(members),
        resumed=settled.count(RESUME),
        cancelled=settled.count(CANCEL),
        errors=errors + settled.count(None),
    )
    return report, ended


_LOST = Verb("lost", None)


def _settled(ending: Transition, outcome: Reply | FlowError) -> Verb | None:
    """What an attempt to end a wait came to: its verb, a race lost, or `None` for an error."""
    try:
        if isinstance(outcome, FlowError):
            raise outcome
        if outcome == OTHER_KEYS:  # in another status than it was read in
            return _LOST
        ending.read(outcome)
    except _LOST_RACES:
        return _LOST
    except FlowError as error:
        log.error("a due flow could not be changed: %s", error)
        return None
    return ending.verb


def _ending(namespace: Namespace, flow: Flow, now: datetime) -> Transition | None:
    """The change that ends a flow's wait; `None` if nothing does yet."""
    if flow.status is not FlowStatus.WAITING:
        return None
    if flow.cancel_requested:
        return Transition.of(namespace, flow, CANCEL, NO_CHANGE, pack_plain({}), expected_revision=None, op_id=None)
    condition = flow.condition
    if condition is None or condition.due is None or condition.due > now:
        return None
    if not condition.timed_out(now):
        return _resuming(namespace, flow, None, op_id=None)
    # It was let in, perhaps by a manager with a higher limit than that of the engine's.
    roomy = attrs.evolve(namespace, max_payload_bytes=sys.maxsize)
    return _resuming(roomy, flow, {TIMED_OUT: flow.wait}, op_id=None)


def _resuming(namespace: Namespace, flow: Flow, patch: dict[str, Any] | None, *, op_id: object) -> Transition:
    """Resume just the version that was read: whoever else saw it due loses by the compare."""
    plain_patch, change = merging("the patch", patch)
    return Transition.of(
        namespace,
        flow,
        RESUME,
        change,
        pack_plain({"state_patch": plain_patch}),
        expected_revision=flow.revision,
        op_id=op_id,
    )


def try_resume_external(
    namespace: Namespace,
    flow_id: FlowRef,
    topic: str,
    correlation_id: str,
    payload: Any,
    *,
    op_id: object = None,
) -> Generator[Any, Any, Flow | None]:
    """Resume a flow if it waits for just this event; `None` otherwise."""
    event = ExternalEvent(topic, correlation_id)
    patch = _event_patch(namespace, payload)
    op = op_id_of(op_id)
    while True:
        flow = yield from get(namespace, flow_id)
        if flow is None:
            return None
        waits = _waits_for(flow, event)
        if not waits and op_id is None:
            return None
        resuming = _resuming(namespace, flow, patch, op_id=None if op_id is None else op)
        if not waits:
            # It may wait no more because this very operation resumed it: only its replay gets past this condition.
            resuming = attrs.evolve(resuming, expected=b"0 -")
        try:
            return (yield from resuming.run(namespace))
        except RevisionMismatch:
            if not waits:
                return None
            # It changed since it was read, and may still wait for this event.
        except _LOST_RACES:
            return None


def _event_patch(namespace: Namespace, payload: Any) -> dict[str, Any] | None:
    """What an event adds to a state. Raises InvalidData for a payload that no flow could take."""
    if payload is None:
        return None
    patch: dict[str, Any] = plain("payload", {"resume_event": payload})
    namespace.require_room("the payload", [pack_plain({"state_patch": patch})])
    return patch


def _waits_for(flow: Flow, event: ExternalEvent) -> bool:
    condition = flow.condition
    return (
        flow.status is FlowStatus.WAITING
        and isinstance(condition, ExternalEvent)
        and (condition.topic, condition.correlation_id) == (event.topic, event.correlation_id)
    )


def resume_waiters(
    namespace: Namespace,
    topic: str,
    correlation_id: str,
    payload: Any,
) -> Generator[Any, Any, list[Flow]]:
    """Resume every flow that waits for this event.

    Raises:
        PartialFailure: some were resumed, or not, and the error tells of each.
    """
    event = ExternalEvent(topic, correlation_id)
    patch = _event_patch(namespace, payload)
    prefix = event.waiter
    found = yield Read(
        [
            command(p, b"ZRANGE", p.waiters, b"[" + prefix, b"[" + prefix + b"\xff", b"BYLEX")
            for p in namespace.keyspace.partitions
        ]
    )
    waiters = targets_of(member[len(prefix) :] for members in found for member in members)
    places = {target.flow_id: place for place, target in enumerate(waiters)}
    resumed: list[Flow] = []
    failed: list[FlowFailure] = []
    while waiters:
        try:
            flows = yield from read_sound(namespace, waiters, "left out of a resume", logging.ERROR)
        except StorageError as error:
            failed += [FlowFailure(places[target.flow_id], target.flow_id, error) for target in waiters]
            break
        resumings = [_resuming(namespace, flow, patch, op_id=None) for flow in flows if _is_waiter(flow, event)]
        outcomes = (yield Batch([one.call(namespace) for one in resumings], confirm=True)) if resumings else []
        waiters = []
        for one, outcome in zip(resumings, outcomes, strict=True):
            try:
                flow = _resumed(one, outcome)
            except RevisionMismatch:  # it has changed since it was read, and may still wait
                waiters.append(Target.at(one.target.flow_id))
            except FlowError as error:
                failed.append(FlowFailure(places[one.target.flow_id], one.target.flow_id, error))
            else:
                resumed += [] if flow is None else [flow]
    if failed:
        raise PartialFailure(failed, done=resumed)
    return resumed


def _is_waiter(flow: Flow, event: ExternalEvent) -> bool:
    """Tell whether a flow waits for an event. One whose stored wait makes no sense must not stop the others."""
    try:
        return _waits_for(flow, event)
    except InvalidData as error:
        log.error("left out of a resume: %s", error)
        return False


def _resumed(resuming: Transition, outcome: Reply | FlowError | Unconfirmed) -> Flow | None:
    """Return the flow that was resumed; `None` for one that no longer waits.

    Raises:
        RevisionMismatch: it has changed since it was read.
    """
    if isinstance(outcome, FlowError):
        raise outcome
    short = outcome if isinstance(outcome, Unconfirmed) else None
    reply = outcome if short is None else short.reply
    if reply == OTHER_KEYS:
        return None
    try:
        flow = resuming.read(reply)
    except RevisionMismatch:
        raise
    except _LOST_RACES:
        return None
    if short is not None:
        raise short.error(flow, resuming.op)
    return flow
