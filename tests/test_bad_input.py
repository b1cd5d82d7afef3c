"""What makes no sense is refused before anything is sent, with a message that names what and why."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import ExternalEvent, Flow, FlowNotFound, FlowStatus, InvalidData, Manual, StepObservation, Timer
from tests.support.subjects import WHO, create, flow_in, observed

if TYPE_CHECKING:
    from tests.support.subjects import Subject

Call = Callable[[Any, Any], object]  # a manager and a flow, `Any` because what is done with them is wrong
NAIVE = datetime(2030, 1, 1)
LONG = "x" * 1025


def nested(depth: int) -> Any:
    """A list in a list, so deep."""
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def creating(field: str, value: object) -> Call:
    """Create a flow with that in the field."""
    return lambda flows, _: flows.create_managed(**WHO | {field: value})


def naming(bad: object, call: Call) -> Call:
    """Make a call with that in place of the flow."""
    return lambda flows, _: call(flows, bad)


def storing(value: object, put: Callable[[Any, Flow, Any], object]) -> Call:
    """Put a value where values go."""
    return lambda flows, flow: put(flows, flow, value)


def waiting_for(wait: object) -> Call:
    """Let the flow wait for that."""
    return lambda flows, flow: flows.set_waiting(flow, wait)


NAMES: dict[str, tuple[Call, str]] = {}
for _field in ("controller_id", "owner_session_key", "requester_origin", "current_step", "goal"):
    _limit = 64 * 1024 if _field == "goal" else 1024
    for _what, _value, _why in (
        ("empty", "", "empty"),
        ("long", "x" * (_limit + 1), str(_limit)),
        ("long in bytes", "ü" * (_limit // 2 + 1), str(_limit)),
        ("bytes", b"name", "string"),
        ("None", None, "string"),
        ("surrogate", "a\ud800", "surrogate"),
    ):
        NAMES[f"{_field} {_what}"] = (creating(_field, _value), f"(?s){_field}.*{_why}")

IDS: dict[str, tuple[Call, str]] = {
    f"{name} {bad!r}": (naming(bad, call), "UUID")
    for bad in ("no uuid", "", "1234", 7, None, b"x" * 16, ["x"])
    for name, call in {
        "get": lambda flows, bad: flows.get(bad),
        "get_many": lambda flows, bad: flows.get_many([uuid4(), bad]),
        "cancel": lambda flows, bad: flows.cancel(bad),
        "append_event": lambda flows, bad: flows.append_event(bad, "note"),
        "list_events": lambda flows, bad: flows.list_events(bad),
        "iter_events": lambda flows, bad: list(flows.iter_events(bad)),
        "list_steps": lambda flows, bad: flows.list_steps(bad),
        "find_step_by_run_id": lambda flows, bad: flows.find_step_by_run_id(bad, "run"),
        "observe": lambda flows, bad: flows.record_step_observation(observed(bad)),
        "mutate": lambda flows, bad: flows.mutate(bad, lambda f: f, kind="k"),
        "watch": lambda flows, bad: list(flows.watch(bad, timeout=0)),
        "wait_for": lambda flows, bad: flows.wait_for(bad, timeout=0),
        "delete": lambda flows, bad: flows.delete(bad),
    }.items()
}
IDS["create None-like"] = (lambda flows, _: flows.create_managed(**WHO, flow_id="no uuid"), "UUID")
IDS["create bytes"] = (lambda flows, _: flows.create_managed(**WHO, flow_id=b"x" * 16), "UUID")

UNSTORABLE: dict[str, tuple[Any, str]] = {
    "set": ({1}, "set"),
    "object": (object(), "object"),
    "complex": (1j, "complex"),
    "function": (nested, "function"),
    "nan": (float("nan"), "nan"),
    "infinity": (float("inf"), "inf"),
    "beyond 64 bits": (2**63, "64 bits"),
    "below 64 bits": (-(2**63) - 1, "64 bits"),
    "naive datetime": (NAIVE, "naive"),
    "date": (date(2030, 1, 1), "date"),
    "timedelta": (timedelta(1), "timedelta"),
    "UUID": (uuid4, "function"),
    "surrogate": ("a\ud800", "surrogate"),
    "bytearray": (bytearray(b"x"), "bytearray"),
    "int key": ({1: "x"}, "1"),
    "None key": ({None: "x"}, "None"),
    "bytes key": ({b"k": "x"}, "b'k'"),
    "surrogate key": ({"a\ud800": 1}, "surrogate"),
    "too deep": (nested(65), "64"),
    "inside": ({"a": [1, {"b": {2}}]}, r"\['?a'?\]\[1\]\['?b'?\].*set"),
    "too large": ("x" * 2**20, "1048576"),
}
SINKS: dict[str, Callable[[Any, Flow, Any], object]] = {
    "create_managed": lambda flows, _, v: flows.create_managed(**WHO, state={"key": v}),
    "create_mirrored": lambda flows, _, v: flows.create_mirrored(**WHO, state={"key": v}),
    "update_state": lambda flows, flow, v: flows.update_state(flow, {"key": v}),
    "update_state whole": lambda flows, flow, v: flows.update_state(flow, [v]),
    "resume": lambda flows, flow, v: flows.resume(flow, {"key": v}),
    "finish": lambda flows, flow, v: flows.finish(flow, {"key": v}),
    "set_waiting": lambda flows, flow, v: flows.set_waiting(flow, {"kind": "mine", "key": v}),
    "append_event": lambda flows, flow, v: flows.append_event(flow, "note", {"key": v}),
    "update_and_append": lambda flows, flow, v: flows.update_and_append(flow, "note", {"key": v}),
    "evolve": lambda flows, flow, v: flows.update_and_append(attrs.evolve(flow, state={"key": v}), "note"),
    "observe": lambda flows, flow, v: flows.record_step_observation(observed(flow, result={"key": v})),
}
VALUES: dict[str, tuple[Call, str]] = {
    f"{sink}: {what}": (storing(value, put), why)
    for what, (value, why) in UNSTORABLE.items()
    for sink, put in SINKS.items()
    if not (what == "too deep" and sink == "update_state whole")
}

WAITS: dict[str, tuple[Call, str]] = {
    f"wait {bad!r}"[:60]: (waiting_for(bad), why)
    for bad, why in (
        (None, "NoneType"),
        ("timer", "str"),
        (7, "int"),
        (["timer"], "list"),
        ({}, "kind"),
        ({"kind": ""}, "kind"),
        ({"kind": 7}, "kind"),
        ({"kind": "timer"}, "at"),
        ({"kind": "timer", "at": None}, "at"),
        ({"kind": "timer", "at": "tomorrow"}, "at.*tomorrow"),
        ({"kind": "timer", "at": "2030-01-01T00:00:00"}, "at.*naive"),
        ({"kind": "timer", "at": "2030-01-01"}, "at.*naive"),
        ({"kind": "timer", "at": 1_900_000_000}, "at"),
        ({"kind": "timer", "at": "1969-12-31T23:59:59Z"}, "at.*1970"),
        ({"kind": "timer", "at": "2030-01-01T00:00:00Z", "deadline": "soon"}, "deadline"),
        ({"kind": "manual", "deadline": "2030-01-01T00:00:00"}, "deadline.*naive"),
        ({"kind": "external_event"}, "topic|correlation_id"),
        ({"kind": "external_event", "topic": "t"}, "correlation_id"),
        ({"kind": "external_event", "topic": "", "correlation_id": "c"}, "topic.*empty"),
        ({"kind": "external_event", "topic": "t", "correlation_id": 42}, "correlation_id.*int"),
        ({"kind": "external_event", "topic": "a\0b", "correlation_id": "c"}, "topic.*NUL"),
        ({"kind": "external_event", "topic": "t", "correlation_id": "\0"}, "correlation_id.*NUL"),
        ({"kind": "external_event", "topic": LONG, "correlation_id": "c"}, "topic.*1024"),
        ({"kind": "mine", 1: 2}, "1"),
    )
}


class Mute:
    """A value whose own `repr` fails."""

    def __repr__(self) -> str:
        raise RuntimeError


def deep() -> Any:
    """A tuple in a tuple, deeper than Python writes."""
    value: Any = ()
    for _ in range(5000):
        value = (value,)
    return value


# What cannot be written into a message, or only at great length.
UNSHOWN: dict[str, Any] = {
    "huge": 10**5000,
    "minus huge": -(10**5000),
    "deep": deep(),
    "mute": Mute(),
    "vast": b"x" * 10**6,
}
WORDLESS: dict[str, tuple[Call, str]] = {
    f"{name} {what}": (naming(value, call), why)
    for what, value in UNSHOWN.items()
    for name, (call, why) in {
        "key": (lambda flows, bad: flows.create_managed(**WHO, state={"a": {bad: 1}}), "keys must be strings"),
        "name": (lambda flows, bad: flows.create_managed(**WHO | {"goal": bad}), "goal"),
        "flow": (lambda flows, bad: flows.cancel(bad), "UUID"),
        "op_id": (lambda flows, bad: flows.cancel(uuid4(), op_id=bad), "op_id"),
        "revision": (lambda flows, bad: flows.cancel(uuid4(), expected_revision=bad), "expected_revision"),
        "increment": (lambda flows, bad: flows.update_state(uuid4(), increment={"n": bad}), "increment"),
        "increment of": (lambda flows, bad: flows.update_state(uuid4(), increment={bad: 1}), "keys must be strings"),
        "unset": (lambda flows, bad: flows.update_state(uuid4(), unset=[bad]), "keys must be strings"),
        "status": (lambda flows, bad: flows.list_by_status(bad), "status"),
        "step status": (lambda flows, bad: flows.record_step_observation(observed(uuid4(), status=bad)), "step status"),
        "after": (lambda flows, bad: list(flows.iter_events(uuid4(), after=bad)), "event id"),
        "wait at": (lambda flows, bad: flows.set_waiting(uuid4(), {"kind": "timer", "at": bad}), "wait at"),
    }.items()
}

OPTIONS: dict[str, tuple[Call, str]] = {
    "increment a list": (lambda flows, flow: flows.update_state(flow, increment=["n"]), "increment"),
    "increment by text": (lambda flows, flow: flows.update_state(flow, increment={"n": "1"}), "increment.*n.*1"),
    "increment by a float": (lambda flows, flow: flows.update_state(flow, increment={"n": 1.0}), "increment.*n.*1.0"),
    "increment by a bool": (lambda flows, flow: flows.update_state(flow, increment={"n": True}), "increment.*n.*True"),
    "increment by None": (lambda flows, flow: flows.update_state(flow, increment={"n": None}), "increment.*n.*None"),
    "increment beyond": (lambda flows, flow: flows.update_state(flow, increment={"n": 2**63}), "increment.*n.*64"),
    "increment an int key": (lambda flows, flow: flows.update_state(flow, increment={1: 1}), "1"),
    "unset text": (lambda flows, flow: flows.update_state(flow, unset="tmp"), "unset"),
    "unset a number": (lambda flows, flow: flows.update_state(flow, unset=[1]), "1"),
    "unset no iterable": (lambda flows, flow: flows.update_state(flow, unset=7), "unset"),
    "one key twice": (lambda flows, flow: flows.update_state(flow, {"n": 1}, increment={"n": 1}), "n"),
    "set and unset": (lambda flows, flow: flows.update_state(flow, {"n": 1}, unset=["n"]), "n"),
    "increment and unset": (lambda flows, flow: flows.update_state(flow, increment={"n": 1}, unset=["n"]), "n"),
    "increment of a list": (lambda flows, flow: flows.update_state(flow, [1], increment={"n": 1}), "mapping"),
    "next_step empty": (lambda flows, flow: flows.update_state(flow, next_step=""), "next_step.*empty"),
    "next_step long": (lambda flows, flow: flows.update_state(flow, next_step=LONG), "next_step.*1024"),
    "next_step number": (lambda flows, flow: flows.update_state(flow, next_step=7), "next_step.*int"),
    "reason": (lambda flows, flow: flows.fail(flow, None), "reason.*NoneType"),
    "reason bytes": (lambda flows, flow: flows.fail(flow, b"x"), "reason.*bytes"),
    "reason surrogate": (lambda flows, flow: flows.fail(flow, "\ud800"), "reason.*surrogate"),
    "reason large": (lambda flows, flow: flows.fail(flow, "x" * 2**20), "1048576"),
    "revision text": (lambda flows, flow: flows.finish(flow, expected_revision="1"), "expected_revision.*'1'"),
    "revision float": (lambda flows, flow: flows.finish(flow, expected_revision=1.0), "expected_revision.*1.0"),
    "revision bool": (lambda flows, flow: flows.finish(flow, expected_revision=True), "expected_revision.*True"),
    "revision negative": (lambda flows, flow: flows.finish(flow, expected_revision=-1), "expected_revision.*-1"),
    "op_id text": (lambda flows, flow: flows.finish(flow, op_id="mine"), "op_id.*mine"),
    "op_id empty": (lambda flows, flow: flows.finish(flow, op_id=""), "op_id"),
    "op_id number": (lambda flows, flow: flows.finish(flow, op_id=7), "op_id.*7"),
    "op_id short": (lambda flows, flow: flows.append_event(flow, "k", op_id=b"short"), "op_id"),
    "kind empty": (lambda flows, flow: flows.append_event(flow, ""), "kind.*empty"),
    "kind number": (lambda flows, flow: flows.append_event(flow, 7), "kind.*int"),
    "kind long": (lambda flows, flow: flows.update_and_append(flow, LONG), "kind.*1024"),
    "no Flow": (lambda flows, flow: flows.update_and_append(flow.id, "kind"), "Flow.*UUID"),
    "evolved status": (lambda flows, flow: flows.update_and_append(attrs.evolve(flow, status="x"), "k"), "status.*x"),
    "evolved revision": (
        lambda flows, flow: flows.update_and_append(attrs.evolve(flow, revision="1"), "k"),
        "revision",
    ),
    "evolved step": (lambda flows, flow: flows.update_and_append(attrs.evolve(flow, current_step=""), "k"), "step"),
    "mutate retries": (lambda flows, flow: flows.mutate(flow, lambda f: f, kind="k", retries="8"), "retries.*'8'"),
    "mutate kind": (lambda flows, flow: flows.mutate(flow, lambda f: f, kind=""), "kind.*empty"),
    "limit text": (lambda flows, _: flows.list_by_owner("o", limit="7"), "limit.*'7'"),
    "limit float": (lambda flows, _: flows.list_by_status("running", limit=7.0), "limit.*7.0"),
    "limit bool": (lambda flows, _: flows.list_by_status("running", limit=True), "limit.*True"),
    "limit of events": (lambda flows, flow: flows.list_events(flow, "7"), "limit.*'7'"),
    "page zero": (lambda flows, _: list(flows.iter_by_owner("o", page=0)), "page.*0"),
    "page text": (lambda flows, _: list(flows.iter_by_status("running", page="x")), "page.*x"),
    "owner empty": (lambda flows, _: flows.list_by_owner(""), "owner.*empty"),
    "owner None": (lambda flows, _: flows.list_by_owner(None), "owner"),
    "owner long": (lambda flows, _: list(flows.iter_by_owner(LONG)), "owner.*1024"),
    "status unknown": (lambda flows, _: flows.list_by_status("sleeping"), "sleeping.*running"),
    "status None": (lambda flows, _: flows.list_by_status(None), "None"),
    "naive bound": (lambda flows, _: flows.list_by_status("running", updated_before=NAIVE), "updated_before.*naive"),
    "text bound": (lambda flows, _: flows.list_by_status("running", updated_before="now"), "updated_before.*str"),
    "after junk": (lambda flows, flow: list(flows.iter_events(flow, after="x-1")), "event id.*x-1"),
    "after beyond": (lambda flows, flow: list(flows.iter_events(flow, after=str(2**64))), "event id"),
    "after number": (lambda flows, flow: list(flows.iter_events(flow, after=5)), "event id.*5"),
    "watch after": (lambda flows, flow: list(flows.watch(flow, after="$")), "event id"),
    "watch timeout": (lambda flows, flow: list(flows.watch(flow, timeout="1")), "timeout.*'1'"),
    "watch negative": (lambda flows, flow: list(flows.watch(flow, timeout=-1)), "timeout.*-1"),
    "wait_for status": (lambda flows, flow: flows.wait_for(flow, "sleeping", timeout=0), "sleeping"),
    "wait_for timeout": (lambda flows, flow: flows.wait_for(flow, timeout=float("nan")), "timeout.*nan"),
    "older_than number": (lambda flows, _: flows.prune_terminal_flows(30), "older_than.*int"),
    "older_than negative": (lambda flows, _: flows.prune_terminal_flows(timedelta(-1)), "older_than"),
    "no observation": (lambda flows, _: flows.record_step_observation({"run_id": "r"}), "StepObservation.*dict"),
    "run_id empty": (lambda flows, flow: flows.record_step_observation(observed(flow, "")), "run_id.*empty"),
    "run_id long": (lambda flows, flow: flows.record_step_observation(observed(flow, LONG)), "run_id.*1024"),
    "run_id to find": (lambda flows, flow: flows.find_step_by_run_id(flow, 7), "run_id.*int"),
    "task": (lambda flows, flow: flows.record_step_observation(observed(flow, task=None)), "task.*NoneType"),
    "step status": (
        lambda flows, flow: flows.record_step_observation(observed(flow, status="x")),
        "status.*'x'.*running",
    ),
    "runtime": (
        lambda flows, flow: flows.record_step_observation(observed(flow), runtime="x"),
        "runtime.*'x'.*managed",
    ),
    "child key": (
        lambda flows, flow: flows.record_step_observation(observed(flow, child_session_key="")),
        "child_session_key.*empty",
    ),
}


def commands_run(subject: Subject) -> int:
    """How many commands the server has run."""
    info: Any = subject.raw.info("stats")
    return int(info["total_commands_processed"])


def refuse_all(subject: Subject, cases: dict[str, tuple[Call, str]]) -> None:
    """Make every call; report all that were not refused as they should be."""
    flows = subject.manager()
    flow = flow_in(flows, "running")
    waiting = flow_in(flows, "waiting")
    before = subject.snapshot()
    wrong = []
    for name, (call, why) in cases.items():
        count = commands_run(subject)
        try:
            call(flows, waiting if name.startswith("resume") else flow)
        except InvalidData as error:
            if not pytest.raises(InvalidData, match=f"(?s){why}").matches(error):
                wrong.append(f"{name}: the message does not say {why!r}: {str(error)[:200]}")
            if len(str(error)) > 2000:
                wrong.append(f"{name}: the message is {len(str(error))} characters long")
        except Exception as error:  # noqa: BLE001 - reported below
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        else:
            wrong.append(f"{name}: accepted")
        if (sent := commands_run(subject) - count - 1) and "mutate" not in name:
            wrong.append(f"{name}: {sent} commands were sent")
    if subject.snapshot() != before:
        wrong.append("something was written")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("field", ["controller_id", "owner_session_key", "requester_origin", "current_step", "goal"])
def test_a_name_is_text_within_its_limit(real_subject: Subject, field: str) -> None:
    """Empty, too long, not text, not encodable: InvalidData naming the field."""
    refuse_all(real_subject, {name: case for name, case in NAMES.items() if name.startswith(field)})


def test_a_flow_is_named_by_a_uuid(real_subject: Subject) -> None:
    """Malformed ids are refused by every method."""
    refuse_all(real_subject, IDS)


@pytest.mark.parametrize("sink", SINKS)
def test_a_value_that_cannot_come_back_is_not_taken(real_subject: Subject, sink: str) -> None:
    """Wherever a value is taken: what msgpack cannot carry there and back, or is too much."""
    refuse_all(real_subject, {name: case for name, case in VALUES.items() if name.startswith(f"{sink}: ")})


def test_a_wait_is_whole(real_subject: Subject) -> None:
    """A known kind with malformed fields, a mapping without a kind, something else."""
    refuse_all(real_subject, WAITS)


def test_an_option_is_what_it_should_be(real_subject: Subject) -> None:
    """Numbers, times, statuses, event ids, op ids."""
    refuse_all(real_subject, OPTIONS)


def test_a_refusal_can_be_read_whatever_is_refused(real_subject: Subject) -> None:
    """More digits or levels than Python writes, a `repr` that fails, a megabyte: InvalidData, and a short message."""
    refuse_all(real_subject, WORDLESS)


def test_a_number_beyond_the_servers_is_none_at_all(real_subject: Subject) -> None:
    """A limit, a page or a time that is larger than anything: there is just more room than things."""
    flows = real_subject.manager()
    flow = flow_in(flows, "running")
    for vast in (2**63, 10**30, 10**5000):
        assert flows.list_by_owner(flow.owner_session_key, limit=vast) == [flow]
        assert flows.list_by_status("running", limit=vast) == [flow]
        assert list(flows.iter_by_owner(flow.owner_session_key, page=min(vast, 2**63 - 1))) == [flow]
        assert len(flows.list_events(flow, vast)) == 2
        assert flows.wait_for(flow, "running", timeout=vast) == flow


@pytest.mark.parametrize("interval", [float("inf"), 1e300, 10**5000], ids=["inf", "float", "int"])
def test_an_engine_may_sleep_for_ever(real_subject: Subject, interval: float) -> None:
    """Between ticks, until something is due or it is stopped."""
    flows = real_subject.manager()
    engine = real_subject.engine(flows)
    with real_subject.running(engine, interval):
        flow = flow_in(flows, "waiting", wait=Timer(at=datetime.now(UTC)))
        assert flows.wait_for(flow, "running", timeout=30).id == flow.id


def test_what_is_just_within_the_limits_is_taken(real_subject: Subject) -> None:
    """The bounds belong to what is allowed."""
    flows = real_subject.manager()
    flow = flows.create_managed(
        controller_id="x" * 1024,
        goal="g" * 64 * 1024,
        owner_session_key="ü" * 512,
        requester_origin="r",
        current_step="s" * 1024,
        state={"deep": nested(63), "min": -(2**63), "max": 2**63 - 1, "large": "x" * (2**20 - 200)},
    )
    assert flows.get(flow.id) == flow
    assert flows.update_state(flow, nested(64)).state == nested(64)
    assert flows.append_event(flow, "k" * 1024, nested(64)).payload == nested(64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Timer(at=NAIVE),
        lambda: Timer(at="2030-01-01T00:00:00Z"),  # type: ignore[arg-type]  # the nonsense
        lambda: Timer(at=datetime(2030, 1, 1, tzinfo=UTC), deadline=NAIVE),
        lambda: Manual(deadline=NAIVE),
        lambda: ExternalEvent("", "c"),
        lambda: ExternalEvent("t\0", "c"),
        lambda: ExternalEvent("t", LONG),
        lambda: ExternalEvent("t", 7),  # type: ignore[arg-type]  # the nonsense
    ],
)
def test_a_wait_cannot_even_be_made_of_nonsense(make: Callable[[], object]) -> None:
    """The values check themselves."""
    with pytest.raises(InvalidData):
        make()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, _: engine.tick(NAIVE),
        lambda engine, _: engine.tick("now"),
        lambda engine, _: engine.run(0),
        lambda engine, _: engine.run(-1),
        lambda engine, _: engine.run("1"),
        lambda engine, _: engine.run(float("nan")),
        lambda engine, flow: engine.try_resume_external(flow, "", "c"),
        lambda engine, flow: engine.try_resume_external(flow, "t\0", "c"),
        lambda engine, _: engine.try_resume_external("no uuid", "t", "c"),
        lambda engine, flow: engine.try_resume_external(flow, "t", "c", {1}),
        lambda engine, flow: engine.try_resume_external(flow, "t", "c", op_id="mine"),
        lambda engine, _: engine.resume_waiters("t", ""),
        lambda engine, _: engine.resume_waiters("t", "c", object()),
    ],
)
def test_an_engine_refuses_nonsense(real_subject: Subject, call: Callable[[Any, Flow], object]) -> None:
    """InvalidData, nothing changed: whether or not anything waits for it."""
    flows = real_subject.manager()
    waiting = flow_in(flows, "waiting", wait=ExternalEvent("t", "c"))
    engine = real_subject.engine(flows)
    before = real_subject.snapshot()
    with pytest.raises(InvalidData):
        call(engine, waiting)
    flows.resume(waiting)
    with pytest.raises(InvalidData):
        call(engine, waiting)
    assert len(before) > 0
    assert flows.get(waiting.id).revision == 3


def test_unknown_ids_are_no_bad_input(real_subject: Subject) -> None:
    """A well-formed id without a flow is FlowNotFound, or None."""
    flows = real_subject.manager()
    with pytest.raises(FlowNotFound):
        flows.cancel(UUID(int=0))
    assert flows.get(UUID(int=0)) is None
    assert real_subject.all_keys() == []


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": ""},
        {"prefix": "a b"},
        {"prefix": "{x}"},
        {"prefix": "x" * 65},
        {"prefix": "x\n"},
        {"prefix": None},
        {"prefix": 7},
        {"partitions": 0},
        {"partitions": -1},
        {"partitions": "16"},
        {"partitions": 1.0},
        {"partitions": True},
        {"partitions": 10**9},
        {"deadline_s": 0},
        {"deadline_s": "15"},
        {"deadline_s": float("inf")},
        {"deadline_s": 1e300},
        {"confirm_within_s": 10**400},
        {"max_payload_bytes": 0},
        {"max_payload_bytes": None},
        {"event_maxlen": 0},
        {"event_maxlen": 99},
        {"event_maxlen": -1},
        {"event_maxlen": 100.0},
        {"event_maxlen": True},
        {"event_maxlen": "100"},
        {"event_maxlen": 2**63},
        {"max_connections": 0},
        {"max_connections": 1.5},
    ],
    ids=str,
)
def test_a_manager_refuses_options_that_make_no_sense(real_subject: Subject, options: dict[str, Any]) -> None:
    """When it is made, before it connects."""
    with pytest.raises(InvalidData, match=next(iter(options))):
        real_subject.manager(**options)


def test_the_payload_limit_can_be_set(real_subject: Subject) -> None:
    """Smaller or larger, for state, payloads and results alike."""
    small = real_subject.manager(max_payload_bytes=1000)
    flow = flow_in(small, "running")
    before = real_subject.snapshot()
    for put in SINKS.values():
        with pytest.raises(InvalidData, match="1000"):
            put(small, flow, "x" * 1001)
    assert real_subject.snapshot() == before
    large = real_subject.manager(max_payload_bytes=2**23)
    assert len(large.update_state(flow, {"x": "x" * 2**21}).state["x"]) == 2**21


def test_values_given_as_text_or_enum_are_the_same(real_subject: Subject) -> None:
    """Statuses may be text; an observation may name its flow in any way."""
    flows = real_subject.manager()
    flow = create(flows)
    assert flows.list_by_status("created") == flows.list_by_status(FlowStatus.CREATED) == [flow]
    for ref in (flow, flow.id, str(flow.id), flow.id.hex):
        assert flows.record_step_observation(StepObservation(ref, "run", "task", "running")).flow_id == flow.id
