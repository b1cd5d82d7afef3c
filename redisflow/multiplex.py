"""One connection for all the tasks of an event loop: written once per loop turn, replies matched in order.

redis-py opens the connection (TLS, AUTH, SELECT, the client's name); from then on the bytes are ours, with hiredis.
A task that awaits its reply costs a future and no lock, and packets of concurrent tasks travel together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import hiredis

from redisflow.aio_wire import AsyncWire
from redisflow.calls import Lost, Packet, Reply
from redisflow.wire import no_reply, packed, refusal_of

if TYPE_CHECKING:
    from redisflow.connection import Endpoint

# Beyond these a packet has a connection to itself, so that small calls do not queue behind it.
_LARGE_BYTES, _LARGE_COMMANDS = 64 * 1024, 64
# Packets under way on one connection; a further caller waits.
_MAX_UNDER_WAY = 4096


class _Pending(NamedTuple):
    """A packet whose replies have not all come."""

    future: asyncio.Future[list[Reply]]
    wanted: int
    sent_s: float


class _Stream(asyncio.Protocol):
    """The bytes of one connection, from when redis-py has opened it."""

    def __init__(self, connection: Any, client_id: int | None, timeout_s: float) -> None:
        """Take the connection over from its stream reader and writer."""
        self._loop = asyncio.get_running_loop()
        self._client_id = client_id
        self._timeout_s = timeout_s
        # redis-py has no public way to give a connection away: its writer is kept here, because a writer that is
        # collected closes its transport, and taken from it there, because so does a connection.
        self._writer: asyncio.StreamWriter = connection._writer  # noqa: SLF001 - see above
        connection._reader = connection._writer = None  # noqa: SLF001 - see above
        self._transport: Any = self._writer.transport
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(replyError=_ErrorReply)
        self._unsent: list[bytes] = []
        self._pending: deque[_Pending] = deque()
        self._replies: list[Reply] = []
        self._room: asyncio.Event = asyncio.Event()
        self._room.set()
        self._may_write = True
        self._watchdog: asyncio.TimerHandle | None = None
        self.lost: Exception | None = None

    @property
    def open(self) -> bool:
        """Whether it takes packets at once."""
        return self.lost is None and self._room.is_set()

    async def room(self) -> None:
        """Wait until it takes packets, or is lost."""
        await self._room.wait()

    def send(self, commands: Sequence[Sequence[bytes]]) -> asyncio.Future[list[Reply]]:
        """Queue a packet for this turn of the loop."""
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += packed(commands)
        self._pending.append(_Pending(future, len(commands), self._loop.time()))
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._timeout_s, self._watch)
        if len(self._pending) >= _MAX_UNDER_WAY:
            self._room.clear()
        return future

    def _flush(self) -> None:
        if self.lost is None and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def _watch(self) -> None:
        """Give the connection up when its oldest packet has waited for the whole socket timeout."""
        self._watchdog = None
        if not self._pending:
            return
        left_s = self._pending[0].sent_s + self._timeout_s - self._loop.time()
        if left_s > 0:
            self._watchdog = self._loop.call_later(left_s, self._watch)
        else:
            self.lose(TimeoutError(f"nothing came for {self._timeout_s} s"))

    def data_received(self, data: bytes) -> None:
        """Hand replies to the packets they belong to; those of a cancelled caller to nobody."""
        self._reader.feed(data)
        try:
            while self._pending:
                reply = self._reader.gets()
                if reply is False:
                    break
                self._take(reply)
        except hiredis.ProtocolError as error:
            self.lose(error)

    def _take(self, reply: Reply) -> None:
        self._replies.append(refusal_of(reply) if isinstance(reply, _ErrorReply) else reply)
        future, wanted, _ = self._pending[0]
        if len(self._replies) == wanted:
            self._pending.popleft()
            if not future.done():
                future.set_result(self._replies)
            self._replies = []
            self._make_room()

    def _make_room(self) -> None:
        if self._may_write and len(self._pending) < _MAX_UNDER_WAY:
            self._room.set()

    def pause_writing(self) -> None:
        """Have callers wait: the server takes bytes more slowly than they come."""
        self._may_write = False
        self._room.clear()

    def resume_writing(self) -> None:
        """Let callers go on."""
        self._may_write = True
        self._make_room()

    def eof_received(self) -> None:
        """Let the transport close: the server has."""

    def connection_lost(self, error: Exception | None) -> None:
        """Tell every caller in flight."""
        self.lose(error or ConnectionError("the server closed the connection"))

    def lose(self, error: Exception) -> None:
        """Close, and settle what is under way as lost: it may have been executed."""
        if self.lost is not None:
            return
        self.lost = error
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._transport.abort()
        for future, _, _ in self._pending:
            if not future.done():
                future.set_exception(no_reply(error, self._client_id))
                future.exception()  # retrieved: a caller that is gone by now is no cause for complaint
        self._pending.clear()
        self._room.set()


class _ErrorReply(Exception):
    """An error reply, with the server's whole text."""


class MultiplexedWire(AsyncWire):
    """Small packets share one connection; large ones and blocking reads have connections of their own."""

    def __init__(self, endpoint: Endpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        """Bind to the running event loop."""
        super().__init__(endpoint, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s)
        self._stream: _Stream | None = None
        self._opening = asyncio.Lock()

    def exchange(self, packet: Packet) -> Awaitable[list[Reply]]:  # type: ignore[override]  # a future is awaitable, too
        """Send a packet and read a reply for each command, as `AsyncWire.exchange`."""
        self._require_own_loop()
        if self._closed:
            raise Lost("the manager was closed", sent=False, lasting=True)
        if _is_large(packet.commands):
            return super().exchange(packet)
        stream = self._stream
        if stream is not None and stream.open:
            return stream.send(packet.commands)
        return self._exchange_when_open(packet)

    async def _exchange_when_open(self, packet: Packet) -> list[Reply]:
        try:
            async with asyncio.timeout(self._acquire_timeout_s):
                stream = await self._opened()
        except TimeoutError:
            raise Lost(f"the connection stayed busy for {self._acquire_timeout_s} s", sent=False) from None
        return await stream.send(packet.commands)

    async def _opened(self) -> _Stream:
        while True:
            async with self._opening:
                if self._stream is None or self._stream.lost is not None:
                    line = await self._open()
                    self._stream = _Stream(line.connection, line.client_id, self._endpoint.socket_timeout_s)
                stream = self._stream
            await stream.room()
            if stream.open:  # or all who waited would go in at once
                return stream

    async def close(self) -> None:
        """Close every connection, and leave an embedded server. A call under way is lost."""
        if self._stream is not None:
            self._stream.lose(ConnectionError("closed by its manager"))
        await super().close()


def _is_large(commands: Sequence[Sequence[bytes]]) -> bool:
    return len(commands) > _LARGE_COMMANDS or sum(map(len, commands[0])) > _LARGE_BYTES
