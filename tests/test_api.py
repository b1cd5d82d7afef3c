"""The public names and signatures: pinned, because user code is written against them."""

from __future__ import annotations

import inspect
import pickle
from typing import Any
from uuid import UUID

import attrs
import pytest

import redisflow
from redisflow import (
    AlreadyTerminal,
    AsyncFlowManager,
    AsyncWaitEngine,
    CancelPending,
    Diagnosis,
    ExternalEvent,
    Finding,
    Flow,
    FlowBatch,
    FlowError,
    FlowEvent,
    FlowExists,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    IllegalTransition,
    InvalidData,
    KeyUsage,
    LayoutMismatch,
    Manual,
    NotDurable,
    OutcomeUnknown,
    RevisionMismatch,
    Severity,
    StepObservation,
    StepRuntime,
    StorageError,
    TickReport,
    Timer,
    WaitEngine,
)

# What a batch queues: every verb that creates or changes flows with single calls.
BATCHED = """
    create_managed create_mirrored start_running set_waiting resume finish fail request_cancel cancel
    update_state update_and_append append_event record_step_observation
"""
NAMES = """
    FlowBatch Queued NewFlow
    Diagnosis Finding KeyUsage Severity
    FlowManager AsyncFlowManager WaitEngine AsyncWaitEngine TickReport
    Flow FlowStatus FlowEvent FlowStep FlowStepStatus StepRuntime StepObservation
    Timer ExternalEvent Manual
    FlowError FlowNotFound FlowExists RevisionMismatch IllegalTransition AlreadyTerminal
    CancelPending InvalidData StorageError OutcomeUnknown NotDurable LayoutMismatch
"""
CREATION = (
    "*, controller_id, goal, owner_session_key=None, requester_origin, current_step='init', state=None, flow_id=None, "
    "exist_ok=False, op_id=None"
)
VERB = "*, expected_revision=None, op_id=None"
MANAGER = {
    "for_owner": "owner",
    "with_durability": "durability",
    "create_managed": CREATION,
    "create_mirrored": CREATION,
    "create_many": "inputs, *, exist_ok=False",
    "get": "flow_id",
    "get_many": "flow_ids",
    "list_by_owner": "owner, *, limit=None",
    "list_by_status": "status, *, limit=None, updated_before=None",
    "iter_by_owner": "owner, *, page=500",
    "iter_by_status": "status, *, page=500, updated_before=None",
    "count_by_status": "",
    "start_running": f"flow, {VERB}",
    "set_waiting": f"flow, wait, {VERB}",
    "resume": f"flow, state_patch=None, {VERB}",
    "finish": f"flow, final_state=None, {VERB}",
    "fail": f"flow, reason, {VERB}",
    "request_cancel": f"flow, {VERB}",
    "cancel": f"flow, {VERB}",
    "update_state": (
        "flow, patch=None, *, next_step=None, increment=None, unset=(), expected_revision=None, op_id=None"
    ),
    "update_and_append": f"flow, kind, payload=None, {VERB}",
    "mutate": "flow_id, fn, *, kind, payload=None, retries=8, expected_revision=None, op_id=None",
    "append_event": f"flow_id, kind, payload=None, {VERB}",
    "list_events": "flow_id, limit=100",
    "iter_events": "flow_id, *, after=None",
    "record_step_observation": (
        "observation, *, runtime=<StepRuntime.MIRRORED: 'mirrored'>, expected_revision=None, op_id=None"
    ),
    "list_steps": "flow_id",
    "find_step_by_run_id": "flow_id, run_id",
    "watch": "flow_id, *, after=None, timeout=None",
    "wait_for": "flow_id, *statuses, timeout=None",
    "delete": f"flow_id, {VERB}",
    "prune_terminal_flows": "older_than",
    "doctor": "*, repair=False, quiet_after=datetime.timedelta(days=1)",
    "from_url": "url=None, *, prefix='redisflow', **options",
    "connect": "",
}
ENGINE = {
    "tick": "now=None",
    "run": "interval=1.0, stop=None",
    "try_resume_external": "flow_id, topic, correlation_id, payload=None, *, op_id=None",
    "resume_waiters": "topic, correlation_id, payload=None",
}
PAIRS = [(FlowManager, AsyncFlowManager), (WaitEngine, AsyncWaitEngine)]


def public_methods(cls: type) -> dict[str, Any]:
    """A class's own public callables."""
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))}


def parameters(method: Any) -> str:
    """A signature without its annotations."""
    signature = inspect.signature(method)
    kept = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=kept, return_annotation=signature.empty))[1:-1]


def test_the_public_names_are_pinned() -> None:
    """All of the design's, each importable; more may be added, none may go."""
    assert set(NAMES.split()) <= set(redisflow.__all__)
    assert sorted(redisflow.__all__) == list(redisflow.__all__)
    for name in redisflow.__all__:
        assert hasattr(redisflow, name)


@pytest.mark.parametrize("cls", [FlowManager, AsyncFlowManager])
def test_the_managers_signatures_are_pinned(cls: type) -> None:
    """Names, kinds and defaults of every method."""
    methods = public_methods(cls)
    assert {name: parameters(methods[name]) for name in MANAGER} == MANAGER


@pytest.mark.parametrize("cls", [WaitEngine, AsyncWaitEngine])
def test_the_engines_signatures_are_pinned(cls: type) -> None:
    """Names, kinds and defaults of every method."""
    assert {name: parameters(method) for name, method in public_methods(cls).items()} == ENGINE


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS)
def test_both_shells_agree(sync: type, asynchronous: type) -> None:
    """The same methods with the same parameters; only closing has the name each world gives it."""
    ours, theirs = public_methods(sync), public_methods(asynchronous)
    assert ours.keys() - theirs.keys() == ({"close", "batch"} if sync is FlowManager else set())
    assert theirs.keys() - ours.keys() == ({"aclose"} if sync is FlowManager else set())
    for name in ours.keys() & theirs.keys():
        assert parameters(ours[name]) == parameters(theirs[name]), name


def test_a_batch_has_the_managers_verbs() -> None:
    """With the same parameters; each returns, queued, what the manager's does."""
    verbs, own = public_methods(FlowManager), public_methods(FlowBatch)
    assert set(own) == {*BATCHED.split(), "send"}
    for name in BATCHED.split():
        assert parameters(own[name]) == parameters(verbs[name]), name
        returned = inspect.signature(verbs[name]).return_annotation
        assert inspect.signature(own[name]).return_annotation == f"Queued[{returned}]", name


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS)
def test_the_asyncio_shell_is_asynchronous(sync: type, asynchronous: type) -> None:
    """Every method is awaited, or gives an async iterator; annotations agree but for that."""
    for name, method in public_methods(asynchronous).items():
        if name in {"from_url", "for_owner", "with_durability", "aclose"}:
            continue
        iterates = "AsyncIterator" in str(inspect.signature(method).return_annotation)
        assert inspect.iscoroutinefunction(method) != iterates, name
        own, other = inspect.signature(method), inspect.signature(public_methods(sync)[name])
        if name not in {"perform", "run", "connect"}:
            assert [p.annotation for p in own.parameters.values()] == [p.annotation for p in other.parameters.values()]
            assert str(own.return_annotation).removeprefix("Async") == str(other.return_annotation), name


@pytest.mark.parametrize("cls", [FlowManager, AsyncFlowManager, FlowBatch, WaitEngine, AsyncWaitEngine])
def test_everything_public_is_described(cls: type) -> None:
    """A docstring that is a sentence, for the class and each method."""
    for name, described in {"the class": cls, **public_methods(cls)}.items():
        assert described.__doc__, name
        assert described.__doc__.strip().split("\n")[0].endswith("."), name


@pytest.mark.parametrize("name", redisflow.__all__)
def test_every_public_name_is_described(name: str) -> None:
    """A docstring of its own."""
    assert getattr(redisflow, name).__doc__


VALUES = {
    Flow: (
        "id controller_id goal owner_session_key requester_origin current_step state wait status cancel_requested "
        "revision etag created_at updated_at"
    ),
    FlowEvent: "id flow_id revision kind payload at",
    FlowStep: "id flow_id runtime child_session_key run_id task status result created_at updated_at",
    StepObservation: "flow_id run_id task status child_session_key result",
    TickReport: "scanned resumed cancelled still_waiting errors",
    Diagnosis: "prefix findings left mended flows memory",
    Finding: "severity kind what flow_id key advice mended",
    KeyUsage: "kind keys bytes estimated",
    Timer: "deadline at",
    ExternalEvent: "deadline topic correlation_id",
    Manual: "deadline",
}


@pytest.mark.parametrize("cls", VALUES)
def test_values_are_frozen_attrs_classes(cls: Any) -> None:
    """With the design's attributes, and none that can be set."""
    names = [field.name for field in attrs.fields(cls) if not field.name.startswith("_")]
    pinned = VALUES[cls].split()
    assert [name for name in names if name in pinned] == pinned
    value = cls.__new__(cls)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.anything = 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, pinned[0], 1)


def test_an_observation_is_given_in_order() -> None:
    """Its arguments may be positional."""
    assert parameters(StepObservation) == "flow_id, run_id, task, status, child_session_key=None, result=None"


def test_the_enums_are_text() -> None:
    """A status compares with its text, and prints as it."""
    assert FlowStatus.RUNNING == "running"  # type: ignore[comparison-overlap]  # mypy keeps a member and its text apart
    assert f"{FlowStatus.RUNNING}" == "running"
    assert [s.value for s in FlowStepStatus] == ["pending", "running", "succeeded", "failed", "cancelled"]
    assert [s.value for s in StepRuntime] == ["managed", "mirrored"]
    assert [s.value for s in sorted(Severity, key=lambda s: s.rank)] == ["ok", "info", "warning", "error"]


ID = UUID(int=7)
ERRORS: list[tuple[FlowError, dict[str, Any]]] = [
    (FlowNotFound(ID), {"flow_id": ID}),
    (FlowExists(ID), {"flow_id": ID}),
    (RevisionMismatch(ID, 3, 5), {"flow_id": ID, "expected": 3, "actual": 5}),
    (
        IllegalTransition(ID, FlowStatus.CREATED, FlowStatus.FINISHED),
        {"flow_id": ID, "source": "created", "target": "finished"},
    ),
    (AlreadyTerminal(ID, FlowStatus.FAILED), {"flow_id": ID, "status": "failed"}),
    (CancelPending(ID), {"flow_id": ID}),
    (InvalidData("no sense"), {"reason": "no sense"}),
    (OutcomeUnknown("abc"), {"op_id": "abc"}),
    (NotDurable("abc", None, 2, 1), {"op_id": "abc", "flow": None, "wanted": 2, "reached": 1}),
    (LayoutMismatch("p", "partition count", 16, 8), {"prefix": "p", "expected": 16, "actual": 8}),
    (StorageError("the server is away"), {}),
]


@pytest.mark.parametrize(("error", "facts"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_carry_their_facts(error: FlowError, facts: dict[str, Any]) -> None:
    """As attributes and in the message; they travel between processes whole."""
    for travelled in (error, pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own bytes
        assert type(travelled) is type(error)
        assert str(travelled) == str(error)
        for name, value in facts.items():
            assert getattr(travelled, name) == value
            assert value is None or str(value) in str(travelled)


def test_every_error_is_a_flow_error() -> None:
    """One base; outcome and durability are storage errors."""
    for error, _ in ERRORS:
        assert isinstance(error, FlowError)
    assert issubclass(OutcomeUnknown, StorageError)
    assert issubclass(NotDurable, StorageError)
    assert not issubclass(LayoutMismatch, StorageError)
