"""DBOS Transact on SQLite: a workflow that publishes its state with `set_event`.

Per change: `DBOS.set_event("state", state)` inside a workflow, the documented way to make a workflow's state known
(https://docs.dbos.dev/python/tutorials/workflow-communication). It is one transaction: the event's value, an entry of
the events' history, and the workflow's step that replay will skip. A record is a workflow, and a caller *is* its
workflow: all its changes are made inside one, so starting and ending workflows costs nothing here. The workflow holds
its state, as it would in an application; nothing is read.

SQLite as DBOS sets it up unless told otherwise: a file, one transaction at a time (BEGIN IMMEDIATE), journal and
fsync as printed (journal_mode=delete, synchronous=2: each commit fsyncs). DBOS itself
recommends SQLite for prototyping and testing and Postgres for production
(https://docs.dbos.dev/python/tutorials/database-connection): no row here says how fast it is there.

Guarantees: durable once acknowledged; event, history and step together; an interrupted workflow is resumed after a
crash, which none of the others here does by itself; any number of processes of one machine. History: every value set.
Not possible: that several callers set the event of one workflow, so there is no row with a shared record.

Threads, because `set_event_async` does the same on a thread of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from threading import local
from uuid import uuid4

from dbos import DBOS, SetWorkflowID
from sqlalchemy import text

from benchmarks.peers.contract import STATE, Stored, ThreadsPeer, patch_of

_EVENT = "state"
_here = local()  # the work of this thread's workflow; arguments of a workflow would have to be stored


@DBOS.workflow()  # type: ignore[untyped-decorator]  # dbos is not in the environment of the type checker
def follow() -> None:
    """The life of one record."""
    DBOS.set_event(_EVENT, dict(STATE))
    _here.work()


class Dbos(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # there is no server
        self._dbos = DBOS(
            config={
                "name": "beside-peers",
                "system_database_url": f"sqlite:///{folder / 'dbos.sqlite'}",
                "log_level": "WARNING",
            }
        )
        DBOS.launch()
        self._records: list[str] = []

    def about(self) -> str:
        with self._dbos._sys_db.engine.connect() as connection:
            journal = connection.execute(text("PRAGMA journal_mode")).scalar()
            synchronous = connection.execute(text("PRAGMA synchronous")).scalar()
        return f"dbos {version('dbos')}, SQLite journal_mode={journal}, synchronous={synchronous}"

    def create(self, records: int) -> None:
        self._records = [str(uuid4()) for _ in range(records)]

    def caller(self, record: int, work: Callable[[], None]) -> None:
        _here.work = work
        with SetWorkflowID(self._records[record]):
            follow()

    def change(self, record: int, number: int) -> bool:  # noqa: ARG002  # the workflow knows which it is
        DBOS.set_event(_EVENT, {**STATE, **patch_of(number)})
        return True

    def stored(self, record: int) -> Stored:
        workflow_id = self._records[record]
        steps = DBOS.list_workflow_steps(workflow_id)
        published = sum(step["function_name"] == "DBOS.setEvent" for step in steps)
        return Stored(DBOS.get_event(workflow_id, _EVENT, timeout_seconds=5), published - 1)

    def close(self) -> None:
        DBOS.destroy()
