"""One connection for all the tasks of an event loop: written once per loop turn, replies matched in order.

redis-py opens the connection (TLS, AUTH, SELECT, the client's name); from then on the bytes are ours, with hiredis.
A task that awaits its reply costs a future and no lock, and packets of concurrent tasks travel together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import hiredis

from redisflow.aio_wire import AsyncWire
from redisflow.calls import Lost, Packet, Refusal, Reply
from redisflow.singleflight import AsyncSingleFlight
from redisflow.wire import Line, no_reply, packed, refusal_of

if TYPE_CHECKING:
    from redisflow.connection import Endpoint

# Beyond these a packet has a connection to itself, so that small calls do not queue behind it.
_LARGE_BYTES, _LARGE_COMMANDS = 64 * 1024, 64
# Packets under way on one connection; a further caller waits.
_MAX_UNDER_WAY = 4096
# A write takes about half of what is under way: the server is at work on it while the other half is made, and a
# system call is spared for each packet but the first. Few are written at once: so it is for each node of a cluster, and
# halves would be more system calls than they are worth. No more at once, or callers could pile up bytes.
_LEAST_WRITE, _LARGEST_WRITE = 24, 256  # packets
_READ_BYTES = 256 * 1024


class _Stream(asyncio.BufferedProtocol):
    """The bytes of one connection, from when redis-py has opened it."""

    def __init__(self, line: Line, timeout_s: float) -> None:
        """Take the connection over from its stream reader and writer."""
        connection = line.connection
        self._loop = asyncio.get_running_loop()
        self.line = line
        self._timeout_s = timeout_s
        # redis-py has no public way to give a connection away: its writer is kept here, because a writer that is
        # collected closes its transport, and taken from it there, because so does a connection.
        self._writer: asyncio.StreamWriter = connection._writer  # noqa: SLF001 - see above
        connection._reader = connection._writer = None  # noqa: SLF001 - see above
        self._transport: Any = self._writer.transport
        self._transport.set_protocol(self)
        # A view: asyncio's TLS reads record after record into slices of it, and a slice of the bytes is a copy.
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._reader = hiredis.Reader(replyError=_ErrorReply)
        self._unsent: list[bytes] = []
        self._lately_under_way, self._write_at = 0, _LEAST_WRITE
        # What is under way: whom to tell, how many replies make up the answer, and until when it may take.
        self._pending: deque[tuple[asyncio.Future[list[Reply]], int, float]] = deque()
        self._replies: list[Reply] = []
        self._room: asyncio.Event = asyncio.Event()
        self._room.set()
        self._may_write = True
        self._heard_s = 0.0  # when the server last answered, or began to owe an answer
        self._watch_at_s = math.inf
        self._watchdog: asyncio.TimerHandle | None = None
        self.open = True  # whether it takes packets at once
        self.lost: Exception | None = None

    async def room(self) -> None:
        """Wait until it takes packets, or is lost."""
        await self._room.wait()

    def send(self, data: bytes, wanted: int, until_s: float) -> asyncio.Future[list[Reply]]:
        """Queue a packet for this turn of the loop: its bytes, the number of its replies, its deadline."""
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if not self._pending:
            self._heard_s = time.monotonic()
            self._watch_by(self._heard_s + self._timeout_s)
        if until_s < self._watch_at_s:
            self._watch_by(until_s)
        self._pending.append((future, wanted, until_s))
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(data)
        if len(self._unsent) >= self._write_at:
            self._flush()
        if len(self._pending) >= _MAX_UNDER_WAY:
            self._close_door()
        return future

    def _flush(self) -> None:
        if self.lost is None and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        under_way = self._lately_under_way = max(len(self._pending), self._lately_under_way * 7 // 8)
        self._write_at = min(max(_LEAST_WRITE, under_way // 2), _LARGEST_WRITE)

    # --- what comes back ---

    def get_buffer(self, _: int) -> memoryview:
        """Where to put what comes."""
        return self._buffer

    def buffer_updated(self, received: int) -> None:
        """Hand replies to the packets they belong to; those of a cancelled caller to nobody."""
        self._heard_s = time.monotonic()
        pending, replies, gets = self._pending, self._replies, self._reader.gets
        try:
            self._reader.feed(self._buffer, 0, received)  # type: ignore[arg-type]  # its stub is off
            while pending and (reply := gets()) is not False:
                replies.append(refusal_of(reply) if type(reply) is _ErrorReply else reply)
                future, wanted, _ = pending[0]
                if len(replies) == wanted:
                    pending.popleft()
                    if not future.done():
                        future.set_result(replies)
                    self._replies = replies = []
        except hiredis.ProtocolError as error:
            self.lose(error)
        if not self.open:
            self._open_door()

    def eof_received(self) -> None:
        """Let the transport close: the server has."""

    def connection_lost(self, error: Exception | None) -> None:
        """Tell every caller in flight."""
        self.lose(error or ConnectionError("the server closed the connection"))

    # --- back-pressure ---

    def pause_writing(self) -> None:
        """Have callers wait: the server takes bytes more slowly than they come."""
        self._may_write = False
        self._close_door()

    def resume_writing(self) -> None:
        """Let callers go on."""
        self._may_write = True
        self._open_door()

    def _close_door(self) -> None:
        self.open = False
        if self.lost is None:
            self._room.clear()

    def _open_door(self) -> None:
        if self.lost is None and self._may_write and len(self._pending) < _MAX_UNDER_WAY:
            self.open = True
            self._room.set()

    # --- deadlines ---

    def _watch_by(self, at_s: float) -> None:
        if at_s < self._watch_at_s:
            if self._watchdog is not None:
                self._watchdog.cancel()
            self._watch_at_s = at_s
            self._watchdog = self._loop.call_later(max(0.0, at_s - time.monotonic()), self._watch)

    def _watch(self) -> None:
        """Settle what is overdue, and give the connection up when the server says nothing for the socket timeout."""
        self._watchdog, self._watch_at_s = None, math.inf
        if not self._pending:
            return
        now_s = time.monotonic()
        if now_s >= self._heard_s + self._timeout_s:
            self.lose(TimeoutError(f"nothing came for {self._timeout_s} s"))
            return
        self._watch_by(self._heard_s + self._timeout_s)
        for future, _, until_s in self._pending:
            if future.done():
                continue
            if now_s >= until_s:
                _tell(future, no_reply(TimeoutError("the deadline passed"), self.line.server))
            else:
                self._watch_by(until_s)

    def lose(self, error: Exception) -> None:
        """Close, and settle what is under way as lost: it may have been executed."""
        if self.lost is not None:
            return
        self.lost = error
        self.open = False
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._loop.is_closed():  # or nobody is left to be told, and the socket goes with the transport
            self._transport.abort()
            for future, _, _ in self._pending:
                if not future.done():
                    _tell(future, no_reply(error, self.line.server))
        self._pending.clear()
        self._room.set()


def _tell(future: asyncio.Future[Any], lost: Lost) -> None:
    future.set_exception(lost)
    future.exception()  # retrieved: a caller that is gone by now is no cause for complaint


class _ErrorReply(Exception):
    """An error reply, with the server's whole text."""


class MultiplexedWire(AsyncWire):
    """Small packets share one connection; those that take long or block have connections of their own."""

    def __init__(self, endpoint: Endpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        """Bind to the running event loop."""
        super().__init__(endpoint, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s)
        self._stream: _Stream | None = None
        self._closed_for_good = False
        self._opening = AsyncSingleFlight[_Stream](self._open_stream)

    def exchange(self, packet: Packet) -> Awaitable[list[Reply]]:  # type: ignore[override]  # a future is awaitable, too
        """Send a packet and read a reply for each command, as `AsyncWire.exchange`."""
        _, commands, until_s, again, confirm = packet
        count, stream = len(commands), self._stream
        if count <= _LARGE_COMMANDS and confirm is None:
            data = packed(commands)
            if len(data) <= _LARGE_BYTES:
                if stream is not None and stream.open and again is None and asyncio.get_running_loop() is self._loop:
                    return stream.send(data, count, until_s)
                return self._exchange_when_open(data, count, until_s)
        return super().exchange(packet)

    async def _exchange_when_open(self, data: bytes, count: int, until_s: float) -> list[Reply]:
        stream = await self._opened(until_s)
        replies = await stream.send(data, count, until_s)
        if any(type(reply) is Refusal and reply.code == "READONLY" for reply in replies):
            stream.lose(ConnectionError("its server is a replica by now"))
        return replies

    async def _opened(self, until_s: float) -> _Stream:
        self._require_own_loop()
        while True:
            stream = self._stream
            if stream is None or stream.lost is not None:
                stream = await self._opening(until_s, until_s)
            try:
                async with asyncio.timeout(until_s - time.monotonic()):
                    await stream.room()
            except TimeoutError:
                raise Lost("the connection stayed busy until the deadline", sent=False) from None
            if stream.open:  # or all who waited would go in at once
                return stream

    async def _open_stream(self, until_s: float) -> _Stream:
        if self._stream is None or self._stream.lost is not None:
            self._stream = _Stream(await self._open(until_s), self._endpoint.socket_timeout_s)
        return self._stream

    async def _open(self, until_s: float) -> Line:
        line = None if self._closed else await super()._open(until_s)
        if line is None or self._closed:  # it may have been closed meanwhile
            if line is not None:
                await line.connection.disconnect(nowait=True)
            raise Lost("the manager was closed", sent=False, lasting=self._closed_for_good)
        return line

    async def renew(self) -> None:
        """Leave every connection: another server has become the primary. A call under way is lost, and sent again."""
        if self._stream is not None:
            self._stream.lose(ConnectionError("another server has become the primary"))
        await super().renew()

    async def close(self, *, for_good: bool = True) -> None:
        """Close every connection, and leave an embedded server. A call under way is lost.

        Args:
            for_good: whether the manager is closed, so that its calls need not be tried again.
        """
        self._closed_for_good = for_good
        if self._stream is not None:
            self._stream.lose(ConnectionError("closed by its manager"))
        await super().close(for_good=for_good)
