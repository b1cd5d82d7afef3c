"""langgraph-checkpoint-sqlite: a checkpoint per change, see `langgraph_thread.py`.

`SqliteSaver.from_conn_string(file)` as in https://pypi.org/project/langgraph-checkpoint-sqlite/, or
`AsyncSqliteSaver`, which passes every call to a thread of its own; the rows have the one that is faster there. Both
use one connection behind a lock; WAL mode, and SQLite's default `synchronous`, FULL: every commit is fsynced. The
package itself warns that SQLite's writes are too slow for production and points to Postgres.

Guarantees: durable once acknowledged; state and metadata are one row, so they cannot part; processes of one machine
may share the file. History: every checkpoint, each with the whole state. Not guaranteed: anything between two writers
of one thread, who fork its history unnoticed; so there is no row with a shared record.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from importlib.metadata import version
from pathlib import Path

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from benchmarks.peers.contract import Stored, TasksPeer, ThreadsPeer
from benchmarks.peers.langgraph_thread import Thread

_PACKAGE = "langgraph-checkpoint-sqlite"


class Threads(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # there is no server
        self._stack = ExitStack()
        self._saver = self._stack.enter_context(SqliteSaver.from_conn_string(str(folder / "langgraph.sqlite")))
        self._saver.setup()
        self._threads: list[Thread] = []

    def about(self) -> str:
        (journal,) = self._saver.conn.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = self._saver.conn.execute("PRAGMA synchronous").fetchone()
        return f"{_PACKAGE} {version(_PACKAGE)}, journal_mode={journal}, synchronous={synchronous}"

    def create(self, records: int) -> None:
        self._threads = [Thread() for _ in range(records)]
        for thread in self._threads:
            thread.config = self._saver.put(*thread.first())

    def change(self, record: int, number: int) -> bool:
        thread = self._threads[record]
        thread.config = self._saver.put(*thread.next(number))
        return True

    def stored(self, record: int) -> Stored:
        config = self._threads[record].read_config
        newest = self._saver.get(config)
        return Stored(newest["channel_values"], sum(1 for _ in self._saver.list(config)) - 1)

    def close(self) -> None:
        self._stack.close()


class Tasks(TasksPeer):
    async def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # there is no server
        self._stack = AsyncExitStack()
        saver = AsyncSqliteSaver.from_conn_string(str(folder / "langgraph.sqlite"))
        self._saver = await self._stack.enter_async_context(saver)
        await self._saver.setup()
        self._threads: list[Thread] = []

    async def about(self) -> str:
        cursor = await self._saver.conn.execute("PRAGMA journal_mode")
        (journal,) = await cursor.fetchone()
        cursor = await self._saver.conn.execute("PRAGMA synchronous")
        (synchronous,) = await cursor.fetchone()
        return f"{_PACKAGE} {version(_PACKAGE)}, journal_mode={journal}, synchronous={synchronous}"

    async def create(self, records: int) -> None:
        self._threads = [Thread() for _ in range(records)]
        for thread in self._threads:
            thread.config = await self._saver.aput(*thread.first())

    async def change(self, record: int, number: int) -> bool:
        thread = self._threads[record]
        thread.config = await self._saver.aput(*thread.next(number))
        return True

    async def stored(self, record: int) -> Stored:
        config = self._threads[record].read_config
        newest = await self._saver.aget(config)
        return Stored(newest["channel_values"], len([_ async for _ in self._saver.alist(config)]) - 1)

    async def close(self) -> None:
        await self._stack.aclose()
