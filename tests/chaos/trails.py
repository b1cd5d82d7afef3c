"""Whether a flow's trail is whole: by itself, by the flow and its steps, and by what was acknowledged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from uuid import UUID

from redisflow import Flow, FlowEvent, FlowStep, InvalidData
from redisflow.codec import read_step
from tests.chaos.findings import Acknowledged, Breach, Damage, Finding
from tests.chaos.specification import Call, Refusal, State, Version, canonical, step

VERBS = {
    "created": "create_managed",
    "started": "start_running",
    "waiting": "set_waiting",
    "resumed": "resume",
    "finished": "finish",
    "failed": "fail",
    "cancel_requested": "request_cancel",
    "cancelled": "cancel",
    "state_updated": "update_state",
}
_OBSERVED = "step_observed"


def is_whole(events: Sequence[FlowEvent]) -> bool:
    """Whether nothing was trimmed away."""
    return bool(events) and (events[0].revision, events[0].kind) == (0, "created")


def judged_trail(flow: Flow, events: Sequence[FlowEvent], event_maxlen: int | None) -> Iterator[Finding]:
    """Judge a trail by itself and by the flow it belongs to.

    Args:
        flow: as its hash has it.
        events: oldest first.
        event_maxlen: so many events a trail without a beginning must have; `None` where none may be without.
    """
    changes, gaps = _changes_of(events)
    if not is_whole(events) and (event_maxlen is None or len(events) < event_maxlen):
        gaps.insert(0, f"it begins with {_told(events[0])}" if events else "there is no event")
    for sentence in gaps:
        yield Finding(Damage.GAP, flow.id, sentence)
    yield from _ops_twice(flow.id, events)
    if gaps:
        return
    if events[-1].revision != flow.revision:
        sentence = f"the hash is at revision {flow.revision}, the trail ends with {_told(events[-1])}"
        yield Finding(Damage.REVISION, flow.id, sentence)
        return
    if changes and changes[-1].op_id != flow.etag:
        sentence = f"it is {flow.etag}, and {_told(changes[-1])} is by {changes[-1].op_id}"
        yield Finding(Damage.ETAG, flow.id, sentence)
    if is_whole(events):
        yield from _replayed(flow, changes)


def _changes_of(events: Sequence[FlowEvent]) -> tuple[list[FlowEvent], list[str]]:
    """The events that made a revision, as far as can be told, and which of all do not follow on the one before.

    A verb's event always made one. Any other did if it carries a revision more than the one before it; of the first
    that was not trimmed away nobody can say.
    """
    changes, gaps = [], []
    for before, event in zip([None, *events], events, strict=False):
        grown_by = None if before is None else event.revision - before.revision
        if grown_by == 1 or (before is None and event.kind in VERBS):
            changes.append(event)
        elif before is not None and (grown_by != 0 or event.kind in VERBS):
            gaps.append(f"{_told(event)} comes behind {_told(before)}")
    return changes, gaps


def _ops_twice(flow_id: UUID, events: Sequence[FlowEvent]) -> Iterator[Finding]:
    times = Counter(event.op_id for event in events)
    if [(event.kind, event.revision) for event in events[:2]] == [("created", 0), ("started", 1)]:
        # A flow that is created running has two events of one operation.
        times[events[0].op_id] -= events[0].op_id == events[1].op_id
    for op_id, count in times.items():
        if count > 1:
            left = ", ".join(_told(event) for event in events if event.op_id == op_id)
            yield Finding(Damage.OP_TWICE, flow_id, f"operation {op_id} left {left}")


def _told(event: FlowEvent) -> str:
    return f"{event.kind!r} of revision {event.revision} ({event.id})"


# --- the trail carried out again -------------------------------------------------------------------------------


def _replayed(flow: Flow, changes: Sequence[FlowEvent]) -> Iterator[Finding]:
    """Carry out what the trail says, and compare what comes of it with what is stored."""
    if any(event.kind not in VERBS for event in changes):
        return  # what `update_and_append` wrote is not in its event
    stored = Version.of(flow)
    try:
        version = _carried_out(stored, changes)
        wait = changes[-1].payload["wait"] if changes[-1].kind == "waiting" else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield Finding(Damage.EVENT, flow.id, f"a payload is not that of its kind: {error!r}")
    except _Forbidden as forbidden:
        yield Finding(Damage.FORBIDDEN, flow.id, str(forbidden))
    else:
        if version != stored:
            yield Finding(Damage.STATE, flow.id, f"the trail makes of it {version}; stored is {stored}")
        elif wait is not None and canonical(wait) != canonical(flow.wait):
            yield Finding(Damage.STATE, flow.id, f"the trail has it wait for {wait}; stored is {flow.wait}")


class _Forbidden(Exception):
    """A change that the rules do not allow, or that would change nothing."""


def _carried_out(stored: Version, changes: Sequence[FlowEvent]) -> Version:
    calls = [Call(VERBS[event.kind], event.payload) for event in changes]
    origin = changes[0].payload["current_step"]
    version = Version("created", 0, _initial_state(stored.state, calls), origin, cancel_requested=False)
    for event, call in zip(changes[1:], calls[1:], strict=True):
        after, answer = step(version, call)
        if after is None or after is version:
            why = answer if isinstance(answer, Refusal) else "nothing to do"
            raise _Forbidden(f"{_told(event)} comes on {version}: {why}")
        version = after
    return version


def _initial_state(stored: State, calls: Sequence[Call]) -> State:
    """The state a flow can have been created with, which no event tells.

    What no event replaces was there from the beginning, less what was added to it.
    """
    patches = [call.patch for call in calls if call.patch is not None]
    if not isinstance(stored, frozenset):
        return frozenset() if patches else stored
    keys = {key for patch in patches if isinstance(patch, dict) for key in patch}
    keys |= {key for call in calls for key in call.arguments.get("unset", ())}
    added = Counter[str]()
    for call in calls:
        added.update(call.arguments.get("increment", {}))
    return frozenset(
        (key, value - added[key] if isinstance(value, int) else value)
        for key, value in stored
        if key not in keys and (key not in added or isinstance(value, int))
    )


# --- steps, and what was acknowledged --------------------------------------------------------------------------


def judged_steps(flow_id: UUID, stored: Mapping[bytes, bytes], events: Sequence[FlowEvent]) -> Iterator[Finding]:
    """Compare each step with the last observation of it."""
    try:
        steps = {run_id.decode(): _step(flow_id, run_id, packed) for run_id, packed in stored.items()}
        payloads = [event.payload for event in events if event.kind == _OBSERVED]
        observed = {payload["run_id"]: (payload["status"], payload["runtime"]) for payload in payloads}
    except InvalidData as error:
        yield Finding(Damage.STEP, flow_id, error.reason)
        return
    except (KeyError, TypeError) as error:
        yield Finding(Damage.EVENT, flow_id, f"a payload is not that of {_OBSERVED!r}: {error!r}")
        return
    for run_id in observed.keys() | (steps.keys() if is_whole(events) else set()):
        last = observed.get(run_id)
        kept = (str(steps[run_id].status), str(steps[run_id].runtime)) if run_id in steps else None
        if kept != last:
            yield Finding(Damage.STEPS, flow_id, f"run {run_id!r} is stored as {kept}, and was last seen as {last}")


def _step(flow_id: UUID, run_id: bytes, packed: bytes) -> FlowStep:
    found = read_step(flow_id, packed)
    if found.run_id.encode() != run_id:
        raise InvalidData(f"run {found.run_id!r} is stored as {run_id!r}")
    return found


def judged_changes(changes: Iterable[Acknowledged], events: Sequence[FlowEvent]) -> Iterator[Finding]:
    """Find each acknowledged change. One that is there twice is an operation that was applied twice."""
    by_op: dict[str, list[FlowEvent]] = defaultdict(list)
    for event in events:
        by_op[event.op_id].append(event)
    trimmed_until = -1 if is_whole(events) or not events else events[0].revision
    for change in changes:
        revisions = {event.revision for event in by_op[change.op_id] if change.kind in {None, event.kind}}
        if not revisions and change.revision > trimmed_until:
            yield Finding(Damage.LOST, change.flow_id, str(change))
        elif revisions and change.revision not in revisions:
            yield Finding(Damage.MISTOLD, change.flow_id, f"{change} is revision {max(revisions)}")


def judged_seen(flow_id: UUID, seen: Iterable[tuple[bytes, float]], events: Sequence[FlowEvent]) -> Iterator[Finding]:
    """Find the event of each operation in the index of brought ids, and none of those that it says were refused."""
    if not is_whole(events):
        return
    times: dict[str, set[int]] = defaultdict(set)
    for event in events:
        times[event.op_id].add(int(event.id.partition("-")[0]))
    for op_id, added_ms in seen:
        if added_ms < 0 and times[op_id.decode()]:
            yield Finding(Breach.REFUSED, flow_id, f"operation {op_id!r}")
        elif added_ms > 0 and int(added_ms) not in times[op_id.decode()]:
            yield Finding(Damage.LOST, flow_id, f"operation {op_id!r} is in the index of brought ids, not in the trail")
