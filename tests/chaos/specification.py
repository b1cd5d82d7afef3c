"""One flow as the rules of docs/concepts.md have it: what a call makes of a version of it, and what it answers.

Versions are small, frozen and hashable, because a checker keeps thousands of them apart. The table and the merges are
those of `tests.support.model`; the library has no part in this.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from tests.support.model import LEADS_TO, TERMINAL, Refused, incremented, merged

# An integer as it is, which can be added to; anything else as text that is the same for the same value.
Value = int | str
State = frozenset[tuple[str, Value]] | Value

CREATIONS = {"create_managed": ("created", 0), "create_mirrored": ("running", 1)}
READS = {"get", "append_event"}  # they leave the flow as it is
TARGETS: dict[str, str | None] = {
    "start_running": "running",
    "set_waiting": "waiting",
    "resume": "running",
    "finish": "finished",
    "fail": "failed",
    "cancel": "cancelled",
    "request_cancel": None,
    "update_state": None,
}
_PATCHES = ("patch", "state_patch", "final_state")
_FACTS = ("expected", "actual", "source", "target", "status")


@attrs.frozen(cache_hash=True)
class Version:
    """What there is to see of a flow at one moment."""

    status: str
    revision: int
    state: State
    current_step: str
    cancel_requested: bool

    @classmethod
    def of(cls, flow: Any) -> Version:
        """Take it from a `Flow`, or from anything with the attributes of one."""
        return cls(
            str(flow.status), flow.revision, state_of(flow.state), flow.current_step, bool(flow.cancel_requested)
        )

    def __str__(self) -> str:
        state = dict(sorted(self.state)) if isinstance(self.state, frozenset) else self.state
        flag = ", cancel requested" if self.cancel_requested else ""
        return f"revision {self.revision}, {self.status}{flag}, at {self.current_step!r}, {_short(state)}"


@attrs.frozen
class Refusal:
    """An error: the name of its class, and its facts but for what it is about."""

    name: str
    facts: frozenset[tuple[str, int | str]] = frozenset()

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Take it from what the library raised."""
        held = {name: getattr(error, name) for name in _FACTS if hasattr(error, name)}
        return cls.named(type(error).__name__, held)

    @classmethod
    def named(cls, name: str, facts: Mapping[str, Any]) -> Refusal:
        """Make one of a class and its facts."""
        return cls(name, frozenset((k, str(v) if isinstance(v, str) else v) for k, v in facts.items()))

    @property
    def actual(self) -> int | None:
        """The revision that a `RevisionMismatch` tells."""
        found = dict(self.facts).get("actual")
        return found if isinstance(found, int) else None

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={fact}' for name, fact in sorted(self.facts))})"


@attrs.frozen
class Noted:
    """The answer of `append_event`: the revision that the entry carries."""

    revision: int

    def __str__(self) -> str:
        return f"noted at revision {self.revision}"


# `None`: a `get` found no flow.
Answer = Version | Refusal | Noted | None


def canonical(value: Any) -> Value:
    """Return the form of a value that is stored and compared."""
    return value if type(value) is int else repr(_ordered(value))


def _ordered(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _ordered(value[key]) for key in sorted(value)}
        case list() | tuple():
            return [_ordered(item) for item in value]
        case str():
            return str(value)  # the statuses are a kind of text
        case datetime():
            return value.astimezone(UTC)
    return value


def state_of(state: Any) -> State:
    """Return the form of a whole state. The time of a failure is the server's to say, and left out."""
    entries = _entries(state)
    return frozenset(entries.items()) if isinstance(entries, dict) else entries


def _entries(state: Any) -> dict[str, Value] | Value:
    if not isinstance(state, Mapping):
        return canonical(state)
    return {str(key): canonical(_timeless(value) if key == "failure" else value) for key, value in state.items()}


def _timeless(failure: Any) -> Any:
    return {key: failure[key] for key in failure if key != "at"} if isinstance(failure, Mapping) else failure


@attrs.frozen(eq=False)
class Call:
    """A verb of the library and its arguments by the library's names, but for the flow and the `op_id`."""

    verb: str
    arguments: Mapping[str, Any]
    patch: dict[str, Value] | Value | None = attrs.field(init=False, repr=False)

    @patch.default
    def _canonical_patch(self) -> dict[str, Value] | Value | None:
        if self.verb == "fail":
            return _entries({"failure": {"reason": self.arguments["reason"]}})
        given = next((self.arguments[name] for name in _PATCHES if name in self.arguments), None)
        return None if given is None else _entries(given)

    def __str__(self) -> str:
        return f"{self.verb}({', '.join(f'{name}={_short(value)}' for name, value in self.arguments.items())})"


def step(flow: Version | None, call: Call) -> tuple[Version | None, Answer]:
    """Return the version after a call, the very same one if nothing changed, and what the call answers."""
    try:
        return _step(flow, call)
    except Refused as refused:
        return flow, Refusal.named(refused.name, refused.facts)


def _step(flow: Version | None, call: Call) -> tuple[Version | None, Answer]:
    """The guards are in the order of docs/concepts.md, but for the replay: an operation is stepped once."""
    verb, arguments = call.verb, call.arguments
    if verb == "get":
        return flow, flow
    if verb in CREATIONS:
        return _create(flow, call)
    if flow is None:
        raise Refused("FlowNotFound")
    expected = arguments.get("expected_revision")
    if expected is not None and expected != flow.revision:
        raise Refused("RevisionMismatch", expected=expected, actual=flow.revision)
    if verb == "append_event":
        return flow, Noted(flow.revision)
    if verb == "request_cancel" and (flow.cancel_requested or flow.status in TERMINAL):
        return flow, flow
    if flow.status in TERMINAL:
        raise Refused("AlreadyTerminal", status=flow.status)
    if flow.cancel_requested and verb != "cancel":
        raise Refused("CancelPending")
    target = TARGETS[verb]
    if target is not None and target not in LEADS_TO[flow.status]:
        raise Refused("IllegalTransition", source=flow.status, target=target)
    changed = Version(
        target or flow.status,
        flow.revision + 1,
        _changed(flow.state, call),
        arguments.get("next_step") or flow.current_step,
        flow.cancel_requested or verb == "request_cancel",
    )
    return changed, changed


def _create(flow: Version | None, call: Call) -> tuple[Version, Version]:
    arguments = call.arguments
    if flow is None:
        status, revision = CREATIONS[call.verb]
        state = arguments.get("state")
        made = state_of({} if state is None else state)
        flow = Version(status, revision, made, arguments.get("current_step", "init"), cancel_requested=False)
    elif not arguments.get("exist_ok"):
        raise Refused("FlowExists")
    return flow, flow


def _changed(stored: State, call: Call) -> State:
    increment, unset = call.arguments.get("increment") or {}, call.arguments.get("unset") or ()
    if call.patch is None and not increment and not unset:
        return stored
    state: Any = dict(stored) if isinstance(stored, frozenset) else stored
    if (increment or unset) and not isinstance(state, dict):
        raise Refused("InvalidData")
    if increment:
        state = incremented(state, increment)
    if call.patch is not None:
        state = merged(state, call.patch)
    return frozenset((k, v) for k, v in state.items() if k not in unset) if isinstance(state, dict) else state


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
