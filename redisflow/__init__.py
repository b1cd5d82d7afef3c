"""Durable state of long-running work, shared by a fleet of agents on Redis or Valkey."""

from redisflow.aio import AsyncFlowManager
from redisflow.batch import FlowBatch
from redisflow.diagnosis import Diagnosis, Finding, KeyUsage, Severity
from redisflow.engine import AsyncWaitEngine, TickReport, WaitEngine
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowExists,
    FlowFailure,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    LayoutMismatch,
    NotDurable,
    OutcomeUnknown,
    PartialFailure,
    RevisionMismatch,
    StorageError,
)
from redisflow.flow import (
    Flow,
    FlowEvent,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    NewFlow,
    StepObservation,
    StepRuntime,
)
from redisflow.manager import FlowManager
from redisflow.ops.batches import Queued
from redisflow.waits import ExternalEvent, Manual, Timer

__all__ = [
    "AlreadyTerminal",
    "AsyncFlowManager",
    "AsyncWaitEngine",
    "CancelPending",
    "Diagnosis",
    "ExternalEvent",
    "Finding",
    "Flow",
    "FlowBatch",
    "FlowError",
    "FlowEvent",
    "FlowExists",
    "FlowFailure",
    "FlowManager",
    "FlowNotFound",
    "FlowStatus",
    "FlowStep",
    "FlowStepStatus",
    "IllegalTransition",
    "InvalidData",
    "KeyUsage",
    "LayoutMismatch",
    "Manual",
    "NewFlow",
    "NotDurable",
    "OutcomeUnknown",
    "PartialFailure",
    "Queued",
    "RevisionMismatch",
    "Severity",
    "StepObservation",
    "StepRuntime",
    "StorageError",
    "TickReport",
    "Timer",
    "WaitEngine",
]
