"""A TCP proxy that knows RESP, and so can lose just the reply, or just the request, that a test aims at."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self

import attrs
import hiredis

_CHUNK = 1 << 18
_LINGER_S = 5.0  # for the other side to take what was sent before we close


@attrs.frozen
class Fault:
    """What happens to a command or its reply."""

    kind: str
    seconds: float = 0.0


PASS = Fault("pass")
CUT_REPLY = Fault("cut_reply")  # the command runs; its reply is swallowed and the client's connection closed
CUT_REQUEST = Fault("cut_request")  # not forwarded: earlier replies arrive, then the connection is closed
DROP = Fault("drop")  # not forwarded: both sides are reset at once, with whatever is on the way
HANG = Fault("hang")  # neither it nor anything behind it is forwarded; the connection stays open
HANG_REPLY = Fault("hang_reply")  # the command runs; neither its reply nor any later one comes


def delay(seconds: float) -> Fault:
    """Hold the command, and those behind it on its connection, before forwarding."""
    return Fault("delay", seconds)


def late(seconds: float = math.inf, *, cut: bool = False) -> Fault:
    """Hold the command, and those behind it on its connection, back from the server, which gets them in the end.

    Args:
        seconds: until they are delivered over the server's side of the connection, which stays open; by default that
            happens only at `FaultProxy.deliver`.
        cut: close the client's side at once. Otherwise the client waits in vain.
    """
    return Fault("late_cut" if cut else "late", seconds)


_LATE = {"late", "late_cut"}
Plan = Callable[[list[bytes]], Fault]


def aim(fault: Fault, *names: str, times: int = 1) -> Plan:
    """Return a plan: the fault for the next `times` commands of these names (scripts, if none is given)."""
    targets = {name.encode() for name in names or ("EVALSHA", "EVAL")}
    left = times

    def plan(command: list[bytes]) -> Fault:
        nonlocal left
        if left == 0 or command[0].upper() not in targets:
            return PASS
        left -= 1
        return fault

    return plan


class FaultProxy:
    """Forwards `host`:`port` to 127.0.0.1:`target_port`, asking `plan` about every command.

    The plan is called in the proxy's thread, one command at a time. It may be replaced at any moment, as may
    `target_port` (for new connections) and `reset` (connections end with RST, not FIN).
    `faults` counts what was carried out, by kind, and `delivered` the commands that came late. Unless set, the port is
    a free one.
    """

    def __init__(
        self,
        target_port: int,
        plan: Plan | None = None,
        *,
        reset: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.target_port = target_port
        self.plan = plan or (lambda _: PASS)
        self.reset = reset
        self.host = host
        self.port = port
        self.connections = 0
        self.faults: Counter[str] = Counter()
        self.delivered = 0
        self._over: asyncio.Event
        self.errors: list[Exception] = []  # what a plan raised; the first is raised again on leaving
        self._links: set[asyncio.Task[None]] = set()
        self._holding: set[asyncio.Task[None]] = set()  # links with commands that are held back
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10), "the proxy does not start"
        return self

    def __exit__(self, *failure: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy does not stop"
        if self.errors:
            raise self.errors[0]

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def inject(self, fault: Fault, *names: str, times: int = 1) -> None:
        """Give the fault to the next `times` commands of these names; to scripts, if none is given."""
        self.plan = aim(fault, *names, times=times)

    def cut_next_reply(self) -> None:
        """Lose the reply to the next script."""
        self.inject(CUT_REPLY)

    def sever(self) -> None:
        """Close every connection there is, but for those whose commands are held back."""
        self._loop.call_soon_threadsafe(self._cancel_links)

    @property
    def held(self) -> int:
        """How many connections have commands that are held back."""
        return len(self._holding)

    def deliver(self) -> None:
        """Deliver what is held back, and wait until the server has answered it."""
        asyncio.run_coroutine_threadsafe(self._deliver(), self._loop).result(60)

    async def _deliver(self) -> None:
        self._over.set()
        self._over, links = asyncio.Event(), set(self._holding)
        while links & self._holding:  # noqa: ASYNC110 - over in a moment
            await asyncio.sleep(0.001)

    def hold(self, link: asyncio.Task[None]) -> asyncio.Event:
        """Note a link whose commands are held back. Returns what is set at `deliver`."""
        self._links.discard(link)
        self._holding.add(link)
        return self._over

    def release(self, link: asyncio.Task[None]) -> None:
        """Note that a link's commands were delivered while its client waited."""
        self._holding.discard(link)
        self._links.add(link)

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._serve, self.host, self.port, limit=_CHUNK, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        self._links |= self._holding
        self._cancel_links()
        await asyncio.gather(*self._links)

    def _cancel_links(self) -> None:
        for link in self._links:
            link.cancel()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        self.connections += 1
        writers = [to_client]
        with suppress(OSError, asyncio.CancelledError):  # nobody to connect to; severed, or the proxy stops
            server, to_server = await asyncio.open_connection("127.0.0.1", self.target_port, limit=_CHUNK)
            writers.append(to_server)
            await _Link(self, client, to_client, server, to_server, task).run()
        for writer in writers:
            writer.transport.abort()
        self._links.discard(task)
        self._holding.discard(task)


@attrs.define
class _Link:
    """A client's connection and its twin to the server."""

    proxy: FaultProxy
    client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    server: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    task: asyncio.Task[None]
    due: deque[Fault] = attrs.field(factory=deque)  # one for each command whose reply has not come
    is_cut: bool = False  # the client's side, while commands are held back

    async def run(self) -> None:
        """Forward until a side closes or a fault ends it; then close so that what was passed on arrives."""
        self.to_client.transport.set_write_buffer_limits(high=0)  # drain() then waits for the last byte
        directions = [asyncio.create_task(self._requests()), asyncio.create_task(self._replies())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            outcomes = await asyncio.gather(*directions, return_exceptions=True)
            self.proxy.errors += [error for error in outcomes if isinstance(error, Exception)]
        await asyncio.gather(_finish(self.server, self.to_server), self._finish_client())

    async def _requests(self) -> None:
        frames, arguments = Frames(), hiredis.Reader()
        while data := await _read(self.client):
            arrived = frames.feed(data)
            for frame in arrived:
                arguments.feed(frame)
                fault = self.proxy.plan(arguments.gets())
                if fault.kind in _LATE:
                    if await self._hold_back(fault, [frame, *arrived], frames):
                        break
                    return None
                if fault in {CUT_REQUEST, DROP, HANG}:
                    return await self._withhold(fault)
                if fault.seconds:
                    self.proxy.faults[fault.kind] += 1
                    await asyncio.sleep(fault.seconds)
                self.due.append(fault)
                self.to_server.write(frame)
            with suppress(OSError):
                await self.to_server.drain()
        return None

    async def _withhold(self, fault: Fault) -> None:
        if fault is DROP:
            _reset(self.to_server)
            _reset(self.to_client)
        while fault is CUT_REQUEST and self.due:  # noqa: ASYNC110 - over in a moment
            await asyncio.sleep(0.001)
        self.proxy.faults[fault.kind] += 1
        while fault is HANG and await _read(self.client):
            pass

    async def _hold_back(self, fault: Fault, held: list[bytes], frames: Frames) -> bool:
        """Keep what the client sends from here on, whatever becomes of the client, and deliver it in the end.

        Returns whether the client is still there.
        """
        over = self.proxy.hold(self.task)
        self.proxy.faults[fault.kind] += 1
        client = asyncio.create_task(self._cut_client() if fault.kind == "late_cut" else self._collect(held, frames))
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), None if math.isinf(fault.seconds) else fault.seconds)
        finally:
            is_there = not client.done() and fault.kind == "late"
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)
        self.is_cut = not is_there  # nobody reads the replies
        self.due.extend(PASS for _ in held)
        self.to_server.write(b"".join(held))
        await self.to_server.drain()
        while self.due:  # noqa: ASYNC110 - over in a moment
            await asyncio.sleep(0.001)
        self.proxy.delivered += len(held)
        if is_there:
            self.proxy.release(self.task)
        return is_there

    async def _collect(self, held: list[bytes], frames: Frames) -> None:
        while data := await _read(self.client):
            held += frames.feed(data)

    async def _cut_client(self) -> None:
        while self.due:  # noqa: ASYNC110 - over in a moment
            await asyncio.sleep(0.001)
        self.is_cut = True
        await self._finish_client()

    async def _replies(self) -> None:
        frames = Frames()
        while data := await _read(self.server):
            for frame in frames.feed(data):
                # Pushed messages, and those of a subscription, answer no command.
                fault = self.due.popleft() if self.due and not frame.startswith(b">") else PASS
                if fault in {CUT_REPLY, HANG_REPLY}:
                    self.proxy.faults[fault.kind] += 1
                    while fault is HANG_REPLY and await _read(self.server):
                        pass
                    return
                if not self.is_cut:
                    self.to_client.write(frame)
            with suppress(OSError):
                await self.to_client.drain()

    async def _finish_client(self) -> None:
        if self.proxy.reset:
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(self.to_client.drain(), _LINGER_S)
            _reset(self.to_client)
        else:
            await _finish(self.client, self.to_client)


class Frames:
    """Cuts a RESP stream at the ends of its top-level values, however the bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what is before it has been understood
        self._open: list[int] = []  # how many values each aggregate around it still lacks

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes; yield the values, as bytes, that are complete."""
        self._buffer += data
        while (line_end := self._buffer.find(b"\r\n", self._at)) >= 0:
            kind, after = self._buffer[self._at], line_end + 2
            size = int(self._buffer[self._at + 1 : line_end]) if kind in b"$!=*~>%|" else 0
            if kind in b"$!=" and size >= 0:
                after += size + 2
                if after > len(self._buffer):
                    return
            self._at = after
            if kind in b"*~>%|" and size > 0:
                # A map (%) has two values an entry, an attribute (|) is part of the value it precedes.
                self._open.append({ord("%"): 2 * size, ord("|"): 2 * size + 1}.get(kind, size))
                continue
            while self._open:
                self._open[-1] -= 1
                if self._open[-1]:
                    break
                self._open.pop()
            else:
                yield bytes(self._buffer[: self._at])
                del self._buffer[: self._at]
                self._at = 0


async def _read(reader: asyncio.StreamReader) -> bytes:
    with suppress(OSError):
        return await reader.read(_CHUNK)
    return b""


async def _finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that no more comes, and read until the other side does: with unread input, a close becomes a reset."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            await writer.drain()
            writer.write_eof()
            while await _read(reader):
                pass


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # closed already
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
