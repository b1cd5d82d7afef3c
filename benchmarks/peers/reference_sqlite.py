"""The algorithm that redisflow replaces: a manager over SQLite that reads, changes its copy, then compares and swaps.

Per change, a Python rendering of what that (Rust) manager does: SELECT the row, merge the patch in the client, then
one transaction that UPDATEs the row if its revision is still the one read and INSERTs the event. If another writer
was first it tries once more, then gives up with an error: counted as refused here, not as a change.

SQLite in WAL mode with its default `synchronous`, FULL, which a connection reports as 2: in a file every commit is
fsynced (https://www.sqlite.org/pragma.html#pragma_synchronous), in memory nothing is. One connection behind a lock
serves all threads: SQLite lets one writer write at a time anyway, and waiting for a lock in the process is faster
than having connections poll for the file's.

Guarantees: change and event together, no update lost; in a file, durable once acknowledged and shared by processes of
one machine; in memory neither. History: every event with its patch. Not guaranteed: that a change goes through when
others write the same row; exactly once when the process dies before it hears of the commit.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from threading import Lock
from time import time
from uuid import uuid4

from benchmarks.peers.contract import KIND, STATE, Stored, ThreadsPeer, patch_of

_ATTEMPTS = 2
_TABLES = """
CREATE TABLE flows (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, state_json TEXT NOT NULL, revision INTEGER NOT NULL,
    updated_at REAL NOT NULL
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows (id), kind TEXT NOT NULL, payload TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX flows_by_status ON flows (status, updated_at);
CREATE INDEX events_of_flow ON events (flow_id, id);
"""


class OnFile(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # there is no server
        self._connect(str(folder / "reference.sqlite"))

    def _connect(self, database: str) -> None:
        self._lock = Lock()
        self._db = sqlite3.connect(database, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(_TABLES)
        self._records: list[str] = []

    def about(self) -> str:
        (journal,) = self._db.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = self._db.execute("PRAGMA synchronous").fetchone()
        return f"SQLite {sqlite3.sqlite_version}, journal_mode={journal}, synchronous={synchronous}"

    def create(self, records: int) -> None:
        self._records = [str(uuid4()) for _ in range(records)]
        rows = [(record, "running", json.dumps(STATE), 0, time()) for record in self._records]
        with self._lock, self._db:
            self._db.executemany("INSERT INTO flows VALUES (?, ?, ?, ?, ?)", rows)

    def change(self, record: int, number: int) -> bool:
        flow_id, patch = self._records[record], patch_of(number)
        for _ in range(_ATTEMPTS):
            status, state, revision = self._read(flow_id)
            if status != "running":
                raise ValueError("not running")
            if self._update_and_append(flow_id, revision, {**json.loads(state), **patch}, {"patch": patch}):
                return True
        return False

    def _read(self, flow_id: str) -> tuple[str, str, int]:
        with self._lock:
            row: tuple[str, str, int] = self._db.execute(
                "SELECT status, state_json, revision FROM flows WHERE id = ?", (flow_id,)
            ).fetchone()
        return row

    def _update_and_append(
        self, flow_id: str, revision: int, state: dict[str, object], payload: dict[str, object]
    ) -> bool:
        """Compare and swap, and record it, in one transaction."""
        now = time()
        with self._lock, self._db:
            swapped = self._db.execute(
                "UPDATE flows SET state_json = ?, revision = ?, updated_at = ? WHERE id = ? AND revision = ?",
                (json.dumps(state), revision + 1, now, flow_id, revision),
            )
            if swapped.rowcount:
                self._db.execute(
                    "INSERT INTO events (flow_id, kind, payload, at) VALUES (?, ?, ?, ?)",
                    (flow_id, KIND, json.dumps(payload), now),
                )
        return bool(swapped.rowcount)

    def stored(self, record: int) -> Stored:
        flow_id = self._records[record]
        _, state, revision = self._read(flow_id)
        (events,) = self._db.execute("SELECT count(*) FROM events WHERE flow_id = ?", (flow_id,)).fetchone()
        if revision != events:
            raise AssertionError("an event is missing, or a revision")
        return Stored(json.loads(state), events)

    def close(self) -> None:
        self._db.close()


class InMemory(OnFile):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # neither files nor a server
        self._connect(":memory:")
