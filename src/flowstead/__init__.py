"""flowstead: durable agent workflows as actors, in your event loop, on one SQLite file."""

from msgspec import UNSET

from flowstead.controller import FlowContext
from flowstead.errors import (
    CancelPending,
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildLost,
    ChildTimedOut,
    CommitFailed,
    FlowError,
    FlowExists,
    FlowNotFound,
    FlowNotManaged,
    IllegalTransition,
    InvalidState,
    MailboxFull,
    OutcomeUnknown,
    RefusedError,
    RevisionConflict,
    RuntimeClosed,
    SnapshotUnreadable,
    StateTooLarge,
    StoreError,
    StoreInUse,
    StoreUnusable,
    TaskNotLinked,
    Unavailable,
)
from flowstead.model.event import Event
from flowstead.model.flow import Flow
from flowstead.model.limits import Limits
from flowstead.model.retry import Retry
from flowstead.model.task import (
    Cancelled,
    Failed,
    Lost,
    Succeeded,
    Task,
    TaskSummary,
    TimedOut,
)
from flowstead.registry import Registry
from flowstead.results import (
    Applied,
    CancelReport,
    Created,
    Refused,
    Rejected,
    TaskCancelReport,
)
from flowstead.runtime import Runtime, open_runtime
from flowstead.session import SessionFlows
from flowstead.step import Step
from flowstead.task_context import TaskContext

__all__ = [
    "UNSET",
    "Applied",
    "CancelPending",
    "CancelReport",
    "Cancelled",
    "ChildCancelled",
    "ChildError",
    "ChildFailed",
    "ChildLost",
    "ChildTimedOut",
    "CommitFailed",
    "Created",
    "Event",
    "Failed",
    "Flow",
    "FlowContext",
    "FlowError",
    "FlowExists",
    "FlowNotFound",
    "FlowNotManaged",
    "IllegalTransition",
    "InvalidState",
    "Limits",
    "Lost",
    "MailboxFull",
    "OutcomeUnknown",
    "Refused",
    "RefusedError",
    "Registry",
    "Rejected",
    "Retry",
    "RevisionConflict",
    "Runtime",
    "RuntimeClosed",
    "SessionFlows",
    "SnapshotUnreadable",
    "StateTooLarge",
    "Step",
    "StoreError",
    "StoreInUse",
    "StoreUnusable",
    "Succeeded",
    "Task",
    "TaskCancelReport",
    "TaskContext",
    "TaskNotLinked",
    "TaskSummary",
    "TimedOut",
    "Unavailable",
    "open_runtime",
]
