"""Carries packets over redis-py connections, for the asyncio manager: one packet, one connection, in order."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis import exceptions as client_errors
from redis.asyncio.sentinel import MasterNotFoundError

from redisflow.calls import Block, Lost, Packet, Primaries, Refusal, Reply
from redisflow.errors import StorageError
from redisflow.sentinel import Sentinels, ended
from redisflow.singleflight import AsyncGathering, AsyncSingleFlight
from redisflow.wire import (
    NO_SENTINEL_ANSWERS,
    NO_SENTINEL_COUNTS,
    SETTLE_S,
    Line,
    Replicas,
    are_permitted,
    blocking,
    counted,
    is_refusal,
    no_reply,
    not_sent,
    packed,
    refusal_of,
    subscribing,
    unnamed,
)

if TYPE_CHECKING:
    from redisflow.connection import Endpoint


class AsyncWire:
    """Connections to one server, shared by the tasks of one event loop.

    At most `max_connections` carry packets at a time: a further caller waits for one, at most the deadline.
    Blocking reads have connections of their own.
    """

    def __init__(self, endpoint: Endpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        """Bind to the running event loop."""
        self._endpoint = endpoint
        self._max_connections = max_connections
        self._acquire_timeout_s = acquire_timeout_s
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._idle: deque[Line] = deque()
        self._idle_blocking: deque[Line] = deque()
        self._slots = asyncio.Semaphore(max_connections)
        self._replicas = Replicas(endpoint.socket_timeout_s)
        self._era = 0
        self._finding = AsyncSingleFlight[Any](self._find, failing=NO_SENTINEL_ANSWERS)
        self._counting = AsyncSingleFlight[None](self._count, failing=NO_SENTINEL_COUNTS)
        self._closed = False
        self.gathering = AsyncGathering()
        self._watching: asyncio.Task[None] | None = None
        if endpoint.sentinels is not None:
            self._watching = self._loop.create_task(endpoint.sentinels.watch(self.renew, self._replicas.recount))

    async def exchange(self, packet: Packet) -> list[Reply]:
        """Send a packet and read a reply for each command.

        Raises:
            Lost: no reply came.
            StorageError: called from another event loop or process than it was made in.
        """
        self._require_own_loop()
        if self._slots.locked():
            try:
                async with asyncio.timeout(self._acquire_timeout_s):
                    await self._slots.acquire()
            except TimeoutError:
                raise Lost(f"all {self._max_connections} connections stayed busy", sent=False) from None
        else:
            await self._slots.acquire()
        try:
            return await self._exchange_over(self._idle, packet)
        finally:
            self._slots.release()

    async def block(self, block: Block, *, asking: bool = False) -> list[Reply]:
        """Wait for entries of a stream; one reply.

        Args:
            block: which, and for how long.
            asking: whether a node of a cluster is to look though the slot is still another's.

        Raises:
            Lost: the connection failed.
        """
        self._require_own_loop()
        packet = blocking(block, self._endpoint.socket_timeout_s, asking=asking)
        return (await self._exchange_over(self._idle_blocking, packet))[-1:]

    async def subscribe(self, channels: Sequence[bytes]) -> Any:
        """A connection of its own that hears channels; `None` if the user may not.

        Raises:
            Lost: the connection failed.
        """
        line = await self._open(time.monotonic() + self._endpoint.socket_timeout_s)
        permitted = False
        try:
            permitted = are_permitted(await _roundtrip(line.connection, subscribing(channels)))
        except (client_errors.RedisError, OSError) as error:
            raise no_reply(error, line.server) from error
        finally:
            if not permitted:
                await line.connection.disconnect(nowait=True)
        return line.connection if permitted else None

    async def primaries(self, _: Primaries) -> list[tuple[int | None, ...]]:
        """A slot of each node that takes changes; one reply."""
        return [(None,)]

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    async def renew(self) -> None:
        """Leave every connection, those in use once they are idle: another server has become the primary."""
        self._era += 1
        self._replicas.forget()
        await self._drop(self._idle)
        await self._drop(self._idle_blocking)

    async def close(self, *, for_good: bool = True) -> None:  # noqa: ARG002 - a shared connection needs it
        """Close every connection, those in use once they are idle, and leave an embedded server."""
        self._closed = True
        if self._watching is not None:
            await ended(self._watching)
        sentinels = self._endpoint.sentinels
        for client in sentinels.clients if sentinels is not None and sentinels.own else ():
            await client.aclose()
        await self._drop(self._idle)
        await self._drop(self._idle_blocking)
        if self._endpoint.lease is not None:
            await asyncio.to_thread(self._endpoint.lease.close)

    def _require_own_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop or os.getpid() != self._pid:
            raise StorageError(
                "this AsyncFlowManager belongs to another event loop or process: make one manager per event loop"
            )

    @staticmethod
    async def _drop(idle: deque[Line]) -> None:
        while idle:
            await idle.pop().connection.disconnect(nowait=True)

    async def _exchange_over(self, idle: deque[Line], packet: Packet) -> list[Reply]:
        confirm, sentinels = packet.confirm, self._endpoint.sentinels
        if sentinels is not None and self._replicas.must_be_counted(confirm):
            await self._count_replicas(packet.until_s, sentinels)
        line = idle.pop() if idle else await self._open(packet.until_s)
        wait = None if confirm is None else self._replicas.wait(confirm, packet.until_s)
        commands = [*packet.commands, *(() if wait is None else wait.commands())]
        count = len(packet.commands)
        try:
            async with asyncio.timeout_at(self._loop.time() + packet.until_s - time.monotonic()):
                everything = await _roundtrip(line.connection, commands)
                replies, said = everything[:count], everything[count:]
                if wait is not None:
                    while wait.goes_on(said, renewed=line.era != self._era):
                        said = await _roundtrip(line.connection, wait.commands())
                    replies = wait.judged(replies)
        except BaseException as error:
            # Cancelled or lost, it has an unread reply: the connection must not be used again.
            await line.connection.disconnect(nowait=True)
            if not isinstance(error, client_errors.RedisError | OSError):
                raise
            await self._drop(idle)  # what broke one connection has most likely broken the idle ones
            raise no_reply(error, line.server) from error
        if line.era != self._era or any(type(reply) is Refusal and reply.code == "READONLY" for reply in replies):
            await line.connection.disconnect(nowait=True)  # its server is a replica by now
            return replies
        idle.append(line)
        if self._closed:
            await self._drop(idle)
        return replies

    async def _find(self, sentinels: Sentinels, until_s: float) -> Any:
        """Ask the Sentinels for the primary's address."""
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                return await sentinels.asker.discover_master(sentinels.name)
        except MasterNotFoundError as error:  # it has just the kinds of the Sentinels' errors
            told = await self._told(sentinels, until_s, "sentinel_masters")
            raise unnamed(sentinels.name, told) from error
        except (client_errors.RedisError, OSError) as error:
            raise not_sent(error, NO_SENTINEL_ANSWERS) from error

    async def _count_replicas(self, until_s: float, sentinels: Sentinels) -> None:
        """Ask the Sentinels how many replicas there are. If none answers, what was known before holds."""
        try:
            await self._counting(until_s, sentinels, until_s)
        except Lost:
            if not self._replicas.are_known:
                raise

    async def _count(self, sentinels: Sentinels, until_s: float) -> None:
        """Ask the Sentinels how many replicas there are: in a failover the primary has lost sight of some."""
        self._replicas.note_asked()
        self._replicas.expect(counted(await self._told(sentinels, until_s, "sentinel_slaves", sentinels.name)))

    @staticmethod
    async def _told(sentinels: Sentinels, until_s: float, question: str, *args: str) -> list[Any]:
        """What each of the Sentinels answers, or the error instead."""

        async def ask(client: Any) -> Any:
            async with asyncio.timeout(until_s - time.monotonic()):
                return await getattr(client, question)(*args)

        return await asyncio.gather(*map(ask, sentinels.clients), return_exceptions=True)

    async def _open(self, until_s: float) -> Line:
        era = self._era
        connection, sentinels = self._endpoint.open(), self._endpoint.sentinels
        primary = None if sentinels is None else await self._finding(until_s, sentinels, until_s)
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                await (connection.connect() if primary is None else connection.connect_to(primary))
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if not isinstance(error, client_errors.RedisError | OSError):
                raise
            raise not_sent(error) from error
        return Line.of(connection, era)


class AsyncEar:
    """Hears that something was published, while it can, as `wire.Ear` does."""

    def __init__(self, subscribe: Callable[[], Awaitable[Any]]) -> None:
        """Listen on the connection that `subscribe` returns; never, once it returns `None`."""
        self._subscribe = subscribe
        self._connection: Any = None
        self._permitted = True

    async def attend(self) -> None:
        """Listen, if it does not: what is published from now on is heard."""
        if self._connection is None and self._permitted:
            with suppress(Lost):
                self._connection = await self._subscribe()
                self._permitted = self._connection is not None

    async def hear(self, wait_s: float, stop: asyncio.Event) -> None:
        """Wait for a message, and what comes right behind it; at most `wait_s` seconds, or until `stop` is set."""
        listening = asyncio.create_task(self._listen(wait_s))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({listening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
            stopping.cancel()
            await asyncio.gather(listening, stopping, return_exceptions=True)

    async def _listen(self, wait_s: float) -> None:
        if self._connection is None:
            await asyncio.sleep(wait_s)
            return
        until_s = time.monotonic() + wait_s
        try:
            while (left_s := until_s - time.monotonic()) > 0:
                # Cut short, it has lost nothing: what came stays in the connection's buffer.
                if await self._connection.read_response(timeout=left_s, disconnect_on_error=False) is not None:
                    until_s = min(until_s, time.monotonic() + SETTLE_S)
        except (client_errors.RedisError, OSError):
            await self.close()

    async def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


async def _roundtrip(connection: Any, commands: Sequence[Sequence[bytes]]) -> list[Reply]:
    await connection.send_packed_command([packed(commands)])
    replies: list[Reply] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response(disable_decoding=True))
        except client_errors.RedisError as error:
            if not is_refusal(error):
                raise
            replies.append(refusal_of(error))
    return replies
