"""langgraph-checkpoint-redis: a checkpoint per change.

`Threads` and `Tasks` call the saver itself, see `langgraph_thread.py`: `RedisSaver.from_conn_string(url)`, then
`setup()`, or `AsyncRedisSaver` and `asetup()`, as in https://pypi.org/project/langgraph-checkpoint-redis/. The rows
have `Threads`, which is faster. `Graph` is what an application calls to change a thread's state,
`graph.update_state(config, patch)` (https://docs.langchain.com/oss/python/langgraph/persistence): it reads the
checkpoint, applies the patch through a graph of one node, and puts the next one, so most of its time is not the
saver's. The rows with targets have the saver, the harder of the two to beat.

The full saver, not the shallow one, which keeps no history. The server needs the modules RedisJSON and RediSearch:
each checkpoint is a JSON document in an index.

Guarantees: any number of processes. Durable after a crash of the server: as the server is configured. History: every
checkpoint, each with the whole state. Not guaranteed: atomicity (the document is written, then in another round trip
the pointer to the newest); anything between two writers of one thread, who fork its history unnoticed; so there is no
row with a shared record.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict
from uuid import uuid4

from langgraph.checkpoint.redis import RedisSaver
from langgraph.checkpoint.redis.aio import AsyncRedisSaver
from langgraph.graph import START, StateGraph

from benchmarks.peers.contract import STATE, Stored, TasksPeer, ThreadsPeer, patch_of
from benchmarks.peers.langgraph_thread import Thread

_PACKAGE = "langgraph-checkpoint-redis"
_NODE = "step"
_ABOUT = f"{_PACKAGE} {version(_PACKAGE)}, redis-py {version('redis')}"


class Threads(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        self._stack = ExitStack()
        self._saver = self._stack.enter_context(RedisSaver.from_conn_string(redis_url))
        self._saver.setup()
        self._threads: list[Thread] = []

    def about(self) -> str:
        return _ABOUT

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
    async def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        self._stack = AsyncExitStack()
        self._saver = await self._stack.enter_async_context(AsyncRedisSaver.from_conn_string(redis_url))
        await self._saver.asetup()
        self._threads: list[Thread] = []

    async def about(self) -> str:
        return _ABOUT

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


class Graph(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        self._stack = ExitStack()
        saver = self._stack.enter_context(RedisSaver.from_conn_string(redis_url))
        saver.setup()
        builder = StateGraph(TypedDict("State", dict.fromkeys(STATE, Any)))  # type: ignore[operator]  # keys are data
        builder.add_node(_NODE, lambda _: {})
        builder.add_edge(START, _NODE)
        self._graph = builder.compile(checkpointer=saver)
        self._configs: list[Any] = []
        self._held: list[Any] = []

    def about(self) -> str:
        return f"{_ABOUT}, langgraph {version('langgraph')}"

    def create(self, records: int) -> None:
        self._configs = [{"configurable": {"thread_id": str(uuid4())}} for _ in range(records)]
        self._held = [self._graph.update_state(config, dict(STATE), as_node=_NODE) for config in self._configs]

    def change(self, record: int, number: int) -> bool:
        self._held[record] = self._graph.update_state(self._held[record], patch_of(number), as_node=_NODE)
        return True

    def stored(self, record: int) -> Stored:
        config = self._configs[record]
        newest = self._graph.get_state(config).values
        return Stored(newest, sum(1 for _ in self._graph.get_state_history(config)) - 1)

    def close(self) -> None:
        self._stack.close()
