"""Carries packets over redis-py connections, for the sync manager: one packet, one connection, in order."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hiredis import pack_command
from redis import exceptions as client_errors

from redisflow.calls import Block, Lost, Packet, Refusal, Reply

if TYPE_CHECKING:
    from redisflow.connection import Endpoint

MAX_BLOCK_S = 2.0
_CODES = {
    client_errors.NoScriptError: "NOSCRIPT",
    client_errors.ReadOnlyError: "READONLY",
    client_errors.OutOfMemoryError: "OOM",
    client_errors.NoPermissionError: "NOPERM",
    client_errors.ClusterDownError: "CLUSTERDOWN",
    client_errors.MasterDownError: "MASTERDOWN",
    client_errors.TryAgainError: "TRYAGAIN",
    client_errors.BusyLoadingError: "LOADING",
}
_LASTING = (client_errors.AuthenticationError, client_errors.AuthorizationError)


def refusal_of(error: Exception) -> Refusal:
    """The server's error reply in redis-py's exception, which for some codes has the code cut off."""
    message = str(error)
    code = _CODES.get(type(error))
    if code is None:
        return Refusal(message.partition(" ")[0], message)
    return Refusal(code, f"{code} {message}")


def refused_all(error: Exception) -> bool:
    """Whether redis-py raised an error reply as a connection error: then no command of the packet ran."""
    return isinstance(error, client_errors.BusyLoadingError) or "max number of clients" in str(error)


def not_sent(error: Exception) -> Lost:
    """The loss of a packet that never left, because no connection could be had."""
    lasting = isinstance(error, _LASTING) or isinstance(error.__context__, ssl.SSLCertVerificationError)
    lost = Lost(f"cannot connect: {error}", sent=False, lasting=lasting)
    lost.__cause__ = error
    return lost


def no_reply(error: Exception) -> Lost:
    """The loss of a packet that may have been executed."""
    lost = Lost(f"no reply: {error}", sent=True)
    lost.__cause__ = error
    return lost


def packed(commands: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The bytes of commands, as redis-py's connections take them."""
    return [b"".join([pack_command(command) for command in commands])]  # type: ignore[arg-type]  # its stub is off


def xread(block: Block, socket_timeout_s: float) -> Sequence[bytes]:
    """The blocking read of a block: shorter than the socket timeout, or its silence would look like a loss."""
    milliseconds = max(1, int(1000 * min(block.wait_s, MAX_BLOCK_S, socket_timeout_s / 2)))
    return (b"XREAD", b"COUNT", b"1", b"BLOCK", b"%d" % milliseconds, b"STREAMS", block.stream, block.after)


class Wire:
    """Connections to one server, shared by threads.

    At most `max_connections` carry packets at a time: a further caller waits for one, at most the deadline.
    Blocking reads have connections of their own.
    """

    def __init__(self, endpoint: Endpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        self._endpoint = endpoint
        self._max_connections = max_connections
        self._acquire_timeout_s = acquire_timeout_s
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._idle: deque[Any] = deque()
        self._idle_blocking: deque[Any] = deque()
        self._slots = threading.BoundedSemaphore(self._max_connections)
        self._closed = False

    def exchange(self, packet: Packet) -> list[Reply]:
        """Send a packet and read a reply for each command.

        Raises:
            Lost: no reply came.
        """
        if self._pid != os.getpid():
            self._reset()  # a forked child must not share its parent's sockets
        if not self._slots.acquire(timeout=self._acquire_timeout_s):
            raise Lost(f"all {self._max_connections} connections stayed busy", sent=False)
        try:
            return self._exchange_over(self._idle, packet.commands)
        finally:
            self._slots.release()

    def block(self, block: Block) -> list[Reply]:
        """Wait for entries of a stream; one reply.

        Raises:
            Lost: the connection failed.
        """
        if self._pid != os.getpid():
            self._reset()
        return self._exchange_over(self._idle_blocking, [xread(block, self._endpoint.socket_timeout_s)])

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close every connection, those in use once they are idle, and leave an embedded server."""
        self._closed = True
        self._drop(self._idle)
        self._drop(self._idle_blocking)
        if self._endpoint.lease is not None:
            self._endpoint.lease.close()

    @staticmethod
    def _drop(idle: deque[Any]) -> None:
        while idle:
            idle.pop().disconnect()

    def _exchange_over(self, idle: deque[Any], commands: Sequence[Sequence[bytes]]) -> list[Reply]:
        try:
            connection = idle.pop()
        except IndexError:
            connection = self._endpoint.open()
        try:
            replies = _roundtrip(connection, commands)
        except BaseException as error:
            # A connection with an unread reply must not be used again.
            connection.disconnect()
            if isinstance(error, Lost):
                self._drop(idle)  # what broke one connection has most likely broken the idle ones
            raise
        idle.append(connection)
        if self._closed:
            self._drop(idle)
        return replies


def _roundtrip(connection: Any, commands: Sequence[Sequence[bytes]]) -> list[Reply]:
    try:
        connection.connect()  # does nothing when it is
    except (client_errors.RedisError, OSError) as error:
        if refused_all(error):
            return [refusal_of(error)] * len(commands)
        raise not_sent(error) from error
    replies: list[Reply] = []
    try:
        connection.send_packed_command(packed(commands))
        for _ in commands:
            try:
                replies.append(connection.read_response(disable_decoding=True))
            except client_errors.ResponseError as error:
                replies.append(refusal_of(error))
    except (client_errors.RedisError, OSError) as error:
        if refused_all(error) and not replies:
            return [refusal_of(error)] * len(commands)
        raise no_reply(error) from error
    return replies
