"""Redis by hand: optimistic locking with WATCH, MULTI and EXEC, as redis-py documents it.

Per change, the loop of https://redis.io/docs/latest/develop/clients/redis-py/transpipe (and of redis-py's own pages on
pipelines): WATCH the record, read it (HGETALL), MULTI, the changed fields and the revision (HSET), the event (XADD),
EXEC; on `WatchError` from the top, until it goes through. Three round trips. Every caller has the connection its
pipeline takes from the client's pool, with redis-py's default settings. A record is a hash, its state keys JSON in
fields of their own; its history a stream. There is no index to maintain, unlike in redisflow.

Guarantees: change and event together, no update lost, any number of processes. Durable after a crash of the server:
as the server is configured. History: every event with its patch. Not guaranteed: exactly once when a reply is lost
(the loop cannot tell), progress of any one writer while others win.

`Threads` and `Tasks` are the same loop with redis-py's two clients; the rows have the one that is faster there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis
import redis.asyncio

from benchmarks.peers.contract import KIND, STATE, Stored, TasksPeer, ThreadsPeer, patch_of

_ABOUT = f"redis-py {version('redis')} with hiredis {version('hiredis')}"
_STATE = "s:"


def _fields(state: Mapping[str, Any]) -> dict[Any, Any]:
    return {_STATE + key: json.dumps(value) for key, value in state.items()}


def _new_record() -> dict[Any, Any]:
    return {"status": "running", "revision": "0", **_fields(STATE)}


def _changed(read: Mapping[Any, Any], patch: Mapping[str, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What to write after reading: the fields, the event. Refuses a record that is not running."""
    if read[b"status"] != b"running":
        raise ValueError("not running")
    revision = str(int(read[b"revision"]) + 1)
    return (
        {"revision": revision, **_fields(patch)},
        {"kind": KIND, "revision": revision, "payload": json.dumps({"patch": patch})},
    )


def _stored(read: Mapping[Any, Any], events: int) -> Stored:
    prefix = len(_STATE)
    state = {field.decode()[prefix:]: json.loads(value) for field, value in read.items() if field.startswith(b"s:")}
    if int(read[b"revision"]) != events:
        raise AssertionError("an event is missing, or a revision")
    return Stored(state, events)


class Threads(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        self._client = redis.Redis.from_url(redis_url)
        self._records: list[str] = []

    def about(self) -> str:
        return _ABOUT

    def create(self, records: int) -> None:
        self._records = [f"record:{uuid4()}" for _ in range(records)]
        for record in self._records:
            self._client.hset(record, mapping=_new_record())

    def change(self, record: int, number: int) -> bool:
        key = self._records[record]
        with self._client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)  # type: ignore[no-untyped-call]  # redis-py's
                    fields, event = _changed(pipe.hgetall(key), patch_of(number))
                    pipe.multi()
                    pipe.hset(key, mapping=fields)
                    pipe.xadd(f"{key}:events", event)
                    pipe.execute()
                except redis.WatchError:
                    continue
                return True

    def stored(self, record: int) -> Stored:
        key = self._records[record]
        return _stored(self._client.hgetall(key), self._client.xlen(f"{key}:events"))

    def close(self) -> None:
        self._client.close()


class Tasks(TasksPeer):
    async def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        self._client = redis.asyncio.Redis.from_url(redis_url)
        self._records: list[str] = []

    async def about(self) -> str:
        return _ABOUT

    async def create(self, records: int) -> None:
        self._records = [f"record:{uuid4()}" for _ in range(records)]
        for record in self._records:
            await self._client.hset(record, mapping=_new_record())

    async def change(self, record: int, number: int) -> bool:
        key = self._records[record]
        async with self._client.pipeline() as pipe:
            while True:
                try:
                    await pipe.watch(key)
                    fields, event = _changed(await pipe.hgetall(key), patch_of(number))
                    pipe.multi()  # type: ignore[no-untyped-call]  # redis-py's
                    pipe.hset(key, mapping=fields)
                    pipe.xadd(f"{key}:events", event)
                    await pipe.execute()
                except redis.WatchError:
                    continue
                return True

    async def stored(self, record: int) -> Stored:
        key = self._records[record]
        return _stored(await self._client.hgetall(key), await self._client.xlen(f"{key}:events"))

    async def close(self) -> None:
        await self._client.aclose()
