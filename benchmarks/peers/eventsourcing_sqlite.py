"""The `eventsourcing` library on SQLite: an aggregate whose events are its history, saved by an application.

Per change: `aggregate.update_state(patch)`, then `application.save(aggregate)`, which stores the new event; the state
is what its events add up to (https://eventsourcing.readthedocs.io, in short: https://pypi.org/project/eventsourcing/).
Each caller keeps the aggregate it has: with the documentation's `repository.get` before each change, the library
would replay the record's events every time, or need a cache. SQLite is the library's own persistence module with its
defaults: a file in WAL mode and SQLite's default `synchronous`, FULL, so every commit fsyncs.

Guarantees: durable once acknowledged; an event is the change, so they cannot part; of two writers who hold the same
version one gets an `IntegrityError`; any number of processes of one machine. History: every event, complete by
design. Not guaranteed: that a change goes through when others write the same aggregate; the current state is stored
nowhere unless one takes snapshots.
"""

from __future__ import annotations

import sqlite3
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from benchmarks.peers.contract import STATE, Stored, ThreadsPeer, patch_of


class Record(Aggregate):  # type: ignore[misc]  # eventsourcing is not in the environment of the type checker
    @event("Created")  # type: ignore[untyped-decorator]  # as above
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    @event("StateUpdated")  # type: ignore[untyped-decorator]  # as above
    def update_state(self, patch: dict[str, Any]) -> None:
        self.state |= patch


class Eventsourcing(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # there is no server
        self._database = folder / "eventsourcing.sqlite"
        self._application = Application[UUID](
            env={"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(self._database)}
        )
        self._records: list[Record] = []

    def about(self) -> str:
        with self._application.recorder.datastore.transaction(commit=False) as cursor:
            cursor.execute("PRAGMA journal_mode")
            (journal,) = cursor.fetchone()
            cursor.execute("PRAGMA synchronous")
            (synchronous,) = cursor.fetchone()
        return (
            f"eventsourcing {version('eventsourcing')}, SQLite {sqlite3.sqlite_version}, "
            f"journal_mode={journal}, synchronous={synchronous}"
        )

    def create(self, records: int) -> None:
        self._records = [Record(state=dict(STATE)) for _ in range(records)]
        self._application.save(*self._records)

    def change(self, record: int, number: int) -> bool:
        self._records[record].update_state(patch=patch_of(number))
        self._application.save(self._records[record])
        return True

    def stored(self, record: int) -> Stored:
        record_id = self._records[record].id
        events = list(self._application.events.get(record_id))
        return Stored(self._application.repository.get(record_id).state, len(events) - 1)

    def close(self) -> None:
        self._application.close()
