"""What must hold at the end of a schedule, when every late packet has arrived.

The server remembers each change that it made, and what sent it. What the callers were answered must agree with that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from redisflow.codec import unpack
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowExists,
    FlowNotFound,
    IllegalTransition,
    OutcomeUnknown,
    RevisionMismatch,
    StorageError,
)
from redisflow.flow import Flow
from tests.protocol.store import Effect, Hash, Life
from tests.protocol.workload import Record, Schedule, fields_of

_NEVER = float("inf")
_SLOW_S = 4.0  # the longest pause is one second
_REFUSALS = (
    AlreadyTerminal,
    CancelPending,
    FlowExists,
    FlowNotFound,
    IllegalTransition,
    RevisionMismatch,
    StorageError,
)
_AUDITS = frozenset({b"note", b"step_observed"})
_STATUS_AFTER = {
    b"created": b"created",
    b"started": b"running",
    b"waiting": b"waiting",
    b"resumed": b"running",
    b"finished": b"finished",
    b"cancelled": b"cancelled",
}
# The fields that may differ between two copies of one version: settling alters the fence in the etag.
_PLAIN = frozenset({b"etag", b"life", b"past", b"created_by"})


def violations(schedule: Schedule) -> list[str]:
    """Return what is wrong with a schedule that was carried out."""
    return list(_Checks(schedule).run())


class _Checks:
    """The checks of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._lives = [schedule.server.lives.get(key, []) for key in schedule.keys]
        self._effects: list[defaultdict[str, list[tuple[Life, Effect]]]] = []
        for lives in self._lives:
            by_op: defaultdict[str, list[tuple[Life, Effect]]] = defaultdict(list)
            self._effects.append(by_op)
            for life in lives:
                for place, effect in enumerate(life.events):
                    # A mirrored flow begins with two events of one operation, which are one effect.
                    if place != 1 or effect.kind != b"started" or effect.op != life.creator:
                        by_op[effect.op.decode()].append((life, effect))
                if life.deletion is not None:
                    by_op[life.deletion.op.decode()].append((life, life.deletion))

    def run(self) -> Iterator[str]:
        """Iterate over all that is wrong."""
        if not self._schedule.is_over:
            yield "it does not come to an end"
        for number, lives in enumerate(self._lives):
            for life in lives:
                yield from self._check_trail(number, life)
            yield from self._check_stored(number, lives)
            yield from self._check_ops(number)
        for record in self._schedule.records:
            if record.began_s == _NEVER or record.is_cancelled:
                continue
            yield from self._check_answer(record)
            if record.batch and record is record.batch[0]:
                yield from self._check_order(record.batch)

    # --- effects

    def _check_ops(self, number: int) -> Iterator[str]:
        for op, effects in self._effects[number].items():
            if len(effects) == 1:
                continue
            lives = [life for life, _ in effects]
            twice = len(set(map(id, lives))) < len(lives)
            # An id that a caller chose may be used again for the flow that took the place of a deleted one.
            records = self._schedule.records
            drawn = not any(record.op == op and record.brought and not record.settles for record in records)
            by_one = len({id(effect.sender) for _, effect in effects}) < len(effects)
            if twice or drawn or by_one:
                list_of = ", ".join(str(effect) for _, effect in effects)
                yield f"op {op[-4:]} took effect {len(effects)} times on flow {number}: {list_of}"

    def _check_trail(self, number: int, life: Life) -> Iterator[str]:
        revision = -1
        for effect in life.events:
            is_change = effect.after or effect.rev == b"%d" % (revision + 1)
            revision += bool(is_change)
            if int(effect.rev) != revision:
                yield f"flow {number}: {effect} should have made, or have been at, revision {revision}"
                return

    def _check_stored(self, number: int, lives: Sequence[Life]) -> Iterator[str]:
        server, key = self._schedule.server, self._schedule.keys[number]
        stored: Hash = server.db.get(key, {})
        if not lives or lives[-1].deletion is not None:
            if b"status" in stored:
                yield f"flow {number} is stored, though it was deleted"
            return
        life = lives[-1]
        folded = _folded(life.events)
        found = {field: stored.get(field) for field in folded}
        if found != folded:
            yield f"flow {number} is not what its trail says: {found} instead of {folded}"
        stream = server.db[key.replace(b"}:flow:", b"}:events:", 1)]
        trail = [(entry.op, entry.kind, entry.rev) for entry in stream.entries]
        expected = [(effect.op, effect.kind, effect.rev) for effect in life.events]
        if trail != expected[len(expected) - len(trail) :] or (not life.trimmed and len(trail) < len(expected)):
            yield f"flow {number}: its trail lacks events, or has others"

    # --- answers

    def _check_answer(self, record: Record) -> Iterator[str]:
        error = record.error
        calm_s = self._schedule.calm_s
        if self._schedule.is_gentle and _SLOW_S < record.ended_s - max(record.began_s, calm_s) < _NEVER:
            yield f"{record} took until {record.ended_s:.3f}, though all is calm from {calm_s:.3f} on"
        if record.ended_s == _NEVER:
            yield f"{record} never ended"
        elif error is None:
            yield from self._check_done(record)
        elif isinstance(error, OutcomeUnknown):
            if self._schedule.is_gentle and not self._may_be_unknown(record):
                yield f"{record}: its outcome is unknown, and need not be: {error}"
        elif isinstance(error, _REFUSALS):
            yield from self._check_refused(record, error)
        else:
            yield f"{record} failed: {type(error).__name__}: {error}"

    def _check_done(self, record: Record) -> Iterator[str]:
        effects = self._effects[record.flow][record.op]
        lives = self._lives[record.flow]
        if record.verb == "delete":
            yield from self._check_deleted(record, lives)
        elif record.verb == "get_or_create":
            result: Any = record.result
            if not effects and not any(_lived(life, record) and life.owner == _owner_of(result) for life in lives):
                yield f"{record} is done, and there was no flow of its owner"
        elif record.verb != "request_cancel" and not any(effect.at_s <= record.ended_s for _, effect in effects):
            yield f"{record} is done, and had no effect"
        if isinstance(record.result, Flow):
            yield from self._check_version(record, lives)

    def _check_deleted(self, record: Record, lives: Sequence[Life]) -> Iterator[str]:
        if record.result is True:
            if not any(life.deletion is not None and _died_during(life, record) for life in lives):
                yield f"{record}: True, and no flow was deleted at the time"
        elif not self._was_absent(record, lives):
            yield f"{record}: False, and there was a flow all the time"

    def _check_version(self, record: Record, lives: Sequence[Life]) -> Iterator[str]:
        fields = fields_of(record.result)
        versions = [
            effect.after
            for life in lives
            for effect in life.events
            if effect.after.get(b"etag", b"")[:32] == fields[b"etag"][:32]
        ]
        if not any(_plain(version) == _plain(fields) for version in versions):
            yield f"{record} was answered a version of the flow that there never was: {fields}"
        elif record.verb in {"create", "mirror"} and not any(
            life.creator.decode() == record.op and life.created_at == fields[b"created_at"] for life in lives
        ):
            yield f"{record} was answered the flow of another creation"

    def _check_refused(self, record: Record, error: FlowError) -> Iterator[str]:
        lives = self._lives[record.flow]
        if type(error) is StorageError and self._schedule.is_gentle:
            yield f"{record}: {error}, though the server could be reached in time"
        if isinstance(error, FlowNotFound) and not self._was_absent(record, lives):
            yield f"{record}: FlowNotFound, and there was a flow all the time"
        if isinstance(error, FlowExists) and not any(_lived(life, record) for life in lives):
            yield f"{record}: FlowExists, and there was none"
        owner = record.client.namespace.owner
        for life, effect in self._effects[record.flow][record.op]:
            # Of what its owner hides from the caller the caller must not learn.
            if owner in {b"", life.owner} and (wrong := _denied(record, error, life, effect)):
                yield f"{record} was refused with {type(error).__name__}, and {wrong}: {effect}"

    def _check_order(self, batch: Sequence[Record]) -> Iterator[str]:
        """Of one flow, what is done is done in its order."""
        last: dict[int, int] = {}
        for record in batch:
            if record.error is not None:
                continue
            numbers = [
                effect.number for _, effect in self._effects[record.flow][record.op] if _sent(record, effect.sender)
            ]
            if numbers and numbers[0] < last.get(record.flow, 0):
                yield f"{record} took effect before one that was queued before it"
            if numbers:
                last[record.flow] = numbers[0]

    # --- what is allowed

    def _may_be_unknown(self, record: Record) -> bool:
        """Tell whether nothing can tell what became of a call."""
        lives = self._lives[record.flow]
        return any(life.trimmed for life in lives) or (len(lives) > 1 and record.brought)

    def _was_absent(self, record: Record, lives: Sequence[Life]) -> bool:
        """Tell whether there was a moment during a call at which its caller could see no flow."""
        owner = record.client.namespace.owner
        seen = [life for life in lives if owner in {b"", life.owner}]
        now_s = record.began_s
        for life in seen:
            if life.born_s > now_s:
                return True
            if life.died_s <= record.ended_s:
                now_s = max(now_s, life.died_s)
                if life is seen[-1] or life.died_s >= record.began_s:
                    return True
        if any(life.reborn and _lived(life, record) for life in lives):
            return True  # nobody can tell of which of two flows a lost attempt has found none
        return not any(_lived(life, record) for life in seen)


def _denied(record: Record, error: FlowError, life: Life, effect: Effect) -> str:
    """Return what is wrong with the refusal of an operation that took effect, if anything is."""
    is_gone = life.died_s <= record.ended_s
    if is_gone and isinstance(error, FlowNotFound | FlowExists):
        return ""  # what was applied to a flow that was deleted since may be answered by what there is now
    by: Any = effect.sender
    if _sent(record, by):
        return "applied"
    if type(error) is StorageError:
        return ""  # this call has changed nothing; it does not tell of others
    if effect.at_s < record.began_s and not is_gone:
        return "had been applied before"
    is_late = effect.at_s > record.ended_s and by is not None and by.ended_s < record.began_s
    return f"{by} applied it later" if is_late else ""


def _lived(life: Life, record: Record) -> bool:
    return life.born_s <= record.ended_s and life.died_s >= record.began_s


def _died_during(life: Life, record: Record) -> bool:
    return record.began_s <= life.died_s <= record.ended_s or (
        life.deletion is not None and life.deletion.op.decode() == record.op and life.died_s <= record.ended_s
    )


def _sent(record: Record, sender: Any) -> bool:
    """Tell whether a call sent a packet: itself, or the batch that it is part of."""
    return sender is record or (sender is not None and bool(record.batch) and sender is record.batch[0])


def _plain(fields: Hash) -> Hash:
    return {field: value for field, value in fields.items() if field not in _PLAIN}


def _owner_of(flow: Flow) -> bytes:
    return flow.owner_session_key.encode()


def _folded(events: Sequence[Effect]) -> dict[bytes, bytes | None]:
    """Return the fields of a flow by its trail."""
    status = b""
    revision = -1
    patches: dict[bytes, int] = {}
    n = 0
    cancel_requested = None
    for effect in events:
        revision = int(effect.rev)
        if effect.kind in _AUDITS or (effect.kind == b"created" and status):
            continue
        status = _STATUS_AFTER.get(effect.kind, status)
        if effect.kind == b"cancel_requested":
            cancel_requested = b"1"
        payload = unpack(effect.payload)
        if effect.kind == b"state_updated":
            n += payload["increment"]["n"]
        for name in ("state_patch", "final_state"):
            patches |= {b"s:" + key.encode(): value for key, value in (payload.get(name) or {}).items()}
    return {
        b"status": status,
        b"revision": b"%d" % revision,
        b"s:n": b"%d" % n,
        b"cancel_requested": cancel_requested,
        **{field: b"%d" % value for field, value in patches.items()},
    }
