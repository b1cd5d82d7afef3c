"""News from Sentinel: another server has become the primary, or a replica has joined.

A planned failover leaves the old primary acknowledging writes for seconds, so connections must not wait to be broken:
they are left as soon as a Sentinel says so. A replica that has joined may be the next primary, so changes that wait for
all replicas must wait for it, too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import attrs
import redis.asyncio
from redis import exceptions as client_errors

log = logging.getLogger("redisflow")

_AGAIN_AFTER_S = 1.0
_GOODBYE_S = 0.5
_CANCEL_EVERY_S = 1.0  # no sooner, or the second would cut short the closing of connections that the first began
# Of the two that tell of a new primary the second is heard first, from the Sentinel that leads the failover.
_SWITCHED, _JOINED = ("+switch-master", "+promoted-slave"), "+slave"


@attrs.frozen
class Sentinels:
    """The Sentinels of one primary.

    Attributes:
        name: what they call it.
        settings: how to connect to each.
        asker: redis-py's `Sentinel`, of the manager's kind, which asks them one after the other who the primary is.
            It must not be used by several at a time: each of two that sort its list would lose a client of it.
        clients: its clients of them.
        own: whether these are to be closed in the end.
    """

    name: str
    settings: Sequence[Mapping[str, Any]]
    asker: Any
    clients: Sequence[Any]
    own: bool = False

    async def watch(self, switched: Callable[[], Awaitable[None]], joined: Callable[[], None]) -> None:
        """Listen to all of them, for ever: each adopts a new primary in its own time, and may be the next one asked.

        Args:
            switched: called when another server has become the primary, and when that may have been missed.
            joined: called when a replica has joined.
        """
        watches = (self._watch(settings, switched, joined) for settings in self.settings)
        # Or a cancellation would end it with the first of them, and the others were still closing connections.
        await asyncio.gather(*watches, return_exceptions=True)

    async def _watch(
        self, settings: Mapping[str, Any], switched: Callable[[], Awaitable[None]], joined: Callable[[], None]
    ) -> None:
        heard_before = False
        task = asyncio.current_task()
        while task is not None and not task.cancelling():  # an error on the way can take a cancellation's place
            try:
                async with redis.asyncio.Redis(**settings) as client, client.pubsub() as ear:
                    await ear.subscribe(*_SWITCHED, _JOINED)
                    if heard_before:  # it may have said so meanwhile
                        await switched()
                    heard_before = True
                    writer = ear.connection._writer  # noqa: SLF001 - redis-py has no public way to see it closed
                    try:
                        async for message in ear.listen():
                            if message["type"] != "message" or self.name.encode() not in message["data"].split():
                                continue
                            if message["channel"] == _JOINED.encode():
                                joined()
                            else:
                                await switched()
                    finally:
                        await _closed(writer)
            except client_errors.NoPermissionError as error:
                log.warning("a Sentinel does not tell of a new primary, so the old one is left late: %s", error)
                return
            except (client_errors.RedisError, OSError):
                if not task.cancelling():
                    await asyncio.sleep(_AGAIN_AFTER_S)


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Wait until it is: redis-py does not, where reading is cancelled, and TLS takes its time to say goodbye."""
    writer.close()
    with suppress(OSError):  # a timeout is one
        async with asyncio.timeout(_GOODBYE_S):
            await writer.wait_closed()


class Watching:
    """A thread that watches Sentinels, for the sync manager."""

    def __init__(self, sentinels: Sentinels, switched: Callable[[], None], joined: Callable[[], None]) -> None:
        """Begin."""
        self._sentinels = sentinels
        self._switched = switched
        self._joined = joined
        self._begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()
        self._thread = threading.Thread(target=self._run, name="redisflow-sentinel", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        async def switched() -> None:
            self._switched()

        async def watch() -> None:
            watching = asyncio.create_task(self._sentinels.watch(switched, self._joined))
            self._begun.set_result((asyncio.get_running_loop(), watching))
            await asyncio.wait({watching})

        asyncio.run(watch())

    def close(self) -> None:
        """End."""
        loop, watching = self._begun.result()
        while self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(watching.cancel)
            self._thread.join(_CANCEL_EVERY_S)


async def ended(watching: asyncio.Task[None]) -> None:
    """End a watch in this event loop."""
    while not watching.done():
        watching.cancel()
        await asyncio.wait({watching}, timeout=_CANCEL_EVERY_S)
