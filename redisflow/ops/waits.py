"""What a wait engine does: resume what is due, answer external events."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

from redisflow.calls import Batch, Read, Reply, command
from redisflow.codec import pack_plain, plain, read_flow
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    RevisionMismatch,
)
from redisflow.flow import CANCEL, RESUME, Flow, FlowRef, FlowStatus, Verb
from redisflow.ops.changes import NO_CHANGE, Transition
from redisflow.ops.fields import merging
from redisflow.ops.namespace import Namespace, Target, target_of
from redisflow.ops.reads import get, hgetall
from redisflow.waits import ExternalEvent, from_us, require_aware, to_us

log = logging.getLogger("redisflow")

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


def tick(namespace: Namespace, now: datetime | None) -> Generator[Any, Any, Tick]:
    """Resume what is due at `now` (the server's time unless given), cancel what was asked to."""
    given_us = None if now is None else to_us(require_aware("now", now))
    partitions = namespace.keyspace.partitions
    total = TickReport()
    while True:
        (seconds, micros), *replies = yield Read(
            [
                command(None, b"TIME"),
                *(command(p, b"ZRANGE", p.due, 0, PAGE - 1, b"WITHSCORES") for p in partitions),
                *(command(p, b"ZCARD", p.status(FlowStatus.WAITING)) for p in partitions),
            ]
        )
        server_us = int(seconds) * 1_000_000 + int(micros)
        now_us = server_us if given_us is None else given_us
        pages, waiting = replies[: len(partitions)], sum(replies[len(partitions) :])
        entries = [pair for flat in pages for pair in zip(flat[::2], map(float, flat[1::2]), strict=True)]
        due = [UUID(member.decode()) for member, score in entries if score <= now_us]
        later = [score for _, score in entries if score > now_us]

        round_ = yield from _handle(namespace, due, from_us(now_us))
        handled = round_.resumed + round_.cancelled
        total = TickReport(
            scanned=total.scanned + round_.scanned,
            resumed=total.resumed + round_.resumed,
            cancelled=total.cancelled + round_.cancelled,
            still_waiting=waiting - handled,
            errors=round_.errors,
        )
        # What could not be handled stays due: only a round that got on is followed by another.
        if not handled or all(len(flat) < 2 * PAGE for flat in pages):
            return Tick(total, (min(later) - server_us) / 1_000_000 if later else None)


def _handle(namespace: Namespace, due: Sequence[UUID], now: datetime) -> Generator[Any, Any, TickReport]:
    """Resume or cancel flows that the index has as due."""
    if not due:
        return TickReport()
    targets = [Target(flow_id) for flow_id in due]
    replies = yield Read([hgetall(namespace, target) for target in targets])
    errors = 0
    endings: list[Transition] = []
    for target, stored in zip(targets, replies, strict=True):
        try:
            flow = read_flow(target.flow_id, stored)
            ending = None if flow is None else _ending(namespace, flow, now)
        except InvalidData as error:
            errors += 1
            log.error("a due flow cannot be handled: %s", error)  # noqa: TRY400 - the message says it all
        else:
            endings += [] if ending is None else [ending]
    outcomes = (yield Batch([ending.call(namespace) for ending in endings])) if endings else []
    ended = [_settled(ending, outcome) for ending, outcome in zip(endings, outcomes, strict=True)]
    return TickReport(
        scanned=len(due),
        resumed=ended.count(RESUME),
        cancelled=ended.count(CANCEL),
        errors=errors + ended.count(None),
    )


_LOST = Verb("lost", None)


def _settled(ending: Transition, outcome: Reply | FlowError) -> Verb | None:
    """What an attempt to end a wait came to: its verb, a race lost, or `None` for an error."""
    try:
        if isinstance(outcome, FlowError):
            raise outcome
        ending.read(outcome)
    except _LOST_RACES:
        return _LOST
    except FlowError as error:
        log.error("a due flow could not be changed: %s", error)  # noqa: TRY400 - the message says it all
        return None
    return ending.verb


def _ending(namespace: Namespace, flow: Flow, now: datetime) -> Transition | None:
    """The change that ends a flow's wait; `None` if nothing does yet."""
    if flow.status is not FlowStatus.WAITING:
        return None
    if flow.cancel_requested:
        return Transition.of(
            namespace, target_of(flow), CANCEL, NO_CHANGE, pack_plain({}), expected_revision=None, op_id=None
        )
    condition = flow.condition
    if condition is None or condition.due is None or condition.due > now:
        return None
    patch = {"wait_timed_out": flow.wait} if condition.timed_out(now) else None
    return _resuming(namespace, flow, patch, op_id=None)


def _resuming(namespace: Namespace, flow: Flow, patch: dict[str, Any] | None, *, op_id: object) -> Transition:
    """Resume just the version that was read: whoever else saw it due loses by the compare."""
    return Transition.of(
        namespace,
        target_of(flow),
        RESUME,
        merging(patch),
        pack_plain({"state_patch": patch}),
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
    patch = None if payload is None else {"resume_event": plain("payload", payload)}
    while True:
        flow = yield from get(namespace, flow_id)
        if flow is None or not _waits_for(flow, event):
            return None
        resuming = _resuming(namespace, flow, patch, op_id=op_id)
        reply = yield resuming.call(namespace)
        try:
            return resuming.read(reply)
        except RevisionMismatch:
            continue  # it changed since it was read: it may still wait for this event
        except _LOST_RACES:
            return None


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
    """Resume every flow that waits for this event."""
    prefix = ExternalEvent(topic, correlation_id).waiter
    found = yield Read(
        [
            command(p, b"ZRANGE", p.waiters, b"[" + prefix, b"[" + prefix + b"\xff", b"BYLEX")
            for p in namespace.keyspace.partitions
        ]
    )
    resumed = []
    for member in (member for members in found for member in members):
        flow_id = UUID(member[len(prefix) :].decode())
        flow = yield from try_resume_external(namespace, flow_id, topic, correlation_id, payload)
        resumed += [] if flow is None else [flow]
    return resumed
