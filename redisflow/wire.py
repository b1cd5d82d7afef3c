"""Carries packets over redis-py connections, for the sync manager: one packet, one connection, in order."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import exceptions as client_errors

from redisflow.calls import Again, Block, Client, Confirm, Lost, Packet, Primaries, Refusal, Reply, Unconfirmed

try:
    import hiredis

    pack_command: Callable[[Any], bytes] = hiredis.pack_command
except ImportError:  # no wheel for this machine: redis-py then reads replies in Python, too

    def pack_command(command: Any) -> bytes:
        """The bytes of a command, as the protocol has them."""
        return b"".join([b"*%d\r\n" % len(command), *[b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in command]])


from redisflow.sentinel import Watching

if TYPE_CHECKING:
    from redisflow.connection import Endpoint

log = logging.getLogger("redisflow")

MAX_BLOCK_S = 2.0
_STOP_WITHIN_S = 0.1  # how soon a thread that listens sees that it should stop
SETTLE_S = 0.005  # messages come in bursts, and one look is enough for each
CLIENT_ID = (b"CLIENT", b"ID")
ASKING = (b"ASKING",)
_TOUCH = b"""#!lua flags=allow-oom
-- Writes what is there.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.pcall('HINCRBY', KEYS[1], 'revision', 0)
end"""
_CODES = {
    client_errors.NoScriptError: "NOSCRIPT",
    client_errors.ReadOnlyError: "READONLY",
    client_errors.OutOfMemoryError: "OOM",
    client_errors.NoPermissionError: "NOPERM",
    client_errors.ClusterDownError: "CLUSTERDOWN",
    client_errors.MasterDownError: "MASTERDOWN",
    client_errors.MovedError: "MOVED",
    client_errors.AskError: "ASK",
    client_errors.TryAgainError: "TRYAGAIN",
    client_errors.BusyLoadingError: "LOADING",
}
_TOO_MANY_CLIENTS = "max number of clients"
_LASTING = (client_errors.AuthenticationError, client_errors.AuthorizationError)


class Line(NamedTuple):
    """An open connection, and what its server knows it by, if it says so."""

    connection: Any
    client: Client | None
    era: int  # of the wire's, when it was opened

    @classmethod
    def of(cls, connection: Any, client_id: Reply, era: int) -> Line:
        """Name a connection by where it leads and what CLIENT ID was answered."""
        if not isinstance(client_id, int):
            return cls(connection, None, era)
        host = getattr(connection, "host", None)
        return cls(connection, (f"{host}:{connection.port}" if host else connection.path, client_id), era)

    def kills(self, again: Again | None) -> list[tuple[bytes, ...]]:
        """What must come before a resend over this connection: the end of those lost on the same server."""
        if again is None or self.client is None:
            return []
        server = self.client[0]
        return [(b"CLIENT", b"KILL", b"ID", b"%d" % number) for at, number in sorted(again.lost) if at == server]


def refusal_of(error: Exception) -> Refusal:
    """The server's error reply in redis-py's exception, which for some codes has the code cut off."""
    message = str(error)
    if _TOO_MANY_CLIENTS in message:
        return Refusal("MAXCLIENTS", message)
    code = _CODES.get(type(error))
    if code is None:
        return Refusal(message.partition(" ")[0], message)
    return Refusal(code, f"{code} {message}")


def is_refusal(error: Exception) -> bool:
    """Whether an error is the server's reply; redis-py raises some as if the connection had failed."""
    said_so = isinstance(error, client_errors.ResponseError | client_errors.BusyLoadingError)
    return said_so or _TOO_MANY_CLIENTS in str(error)


def not_sent(error: Exception) -> Lost:
    """The loss of a packet that never left, because no connection could be had."""
    lasting = isinstance(error, _LASTING) or isinstance(error.__context__, ssl.SSLCertVerificationError)
    lost = Lost(f"cannot connect: {error}", sent=False, lasting=lasting)
    lost.__cause__ = error
    return lost


def no_reply(error: Exception, client: Client | None) -> Lost:
    """The loss of a packet that may have been executed."""
    lost = Lost(f"no reply: {error}", sent=True, client=client)
    lost.__cause__ = error
    return lost


def packed(commands: Sequence[Sequence[bytes]]) -> bytes:
    """The bytes of commands."""
    if len(commands) == 1:
        return pack_command(commands[0])
    return b"".join([pack_command(command) for command in commands])


def subscribing(channels: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The commands that subscribe, each answered by one reply."""
    return [(b"SUBSCRIBE", channel) for channel in channels]


def are_permitted(replies: Sequence[Reply]) -> bool:
    """Whether the server let a connection subscribe; a refusal is logged."""
    refusals = [reply.message for reply in replies if isinstance(reply, Refusal)]
    if refusals:
        log.warning("an engine is not told of new timers, and looks when its interval is over: %s", refusals[0])
    return not refusals


def blocking(block: Block, socket_timeout_s: float, *, asking: bool) -> Packet:
    """The blocking read of a block: shorter than the socket timeout, or its silence would look like a loss."""
    wait_s = min(block.wait_s, MAX_BLOCK_S, socket_timeout_s / 2)
    milliseconds = b"%d" % max(1, int(1000 * wait_s))
    command = (b"XREAD", b"COUNT", b"1", b"BLOCK", milliseconds, b"STREAMS", block.stream, block.after)
    commands = [ASKING, command] if asking else [command]
    return Packet([block.slot] * len(commands), commands, time.monotonic() + socket_timeout_s)


class Replicas:
    """The replicas of a server, as far as was seen: what to wait for behind a change, and whether it came."""

    def __init__(self, socket_timeout_s: float) -> None:
        self._socket_timeout_s = socket_timeout_s
        self._seen = 1  # to wait for all where there are none would promise nothing

    def wanted(self, confirm: Confirm) -> int:
        """How many to wait for."""
        return max(self._seen, confirm.at_least) if confirm.replicas is None else confirm.replicas

    def expect(self, count: int) -> None:
        """Take in how many there are, connected or not."""
        self._seen = max(1, count)

    def waiting(self, confirm: Confirm, wanted: int) -> list[tuple[bytes, ...]]:
        """The commands that wait for them."""
        milliseconds = max(1, int(1000 * min(confirm.within_s, self._socket_timeout_s / 2)))
        return [
            *([ASKING] if confirm.asking else []),
            (b"EVAL", _TOUCH, b"1", confirm.flow_keys[-1]),
            (b"WAIT", b"%d" % wanted, b"%d" % milliseconds),
            (b"ROLE",),
        ]

    def see(self, said: Sequence[Reply]) -> None:
        """Learn from the replies to those commands how many there are."""
        if not isinstance(said[-1], Refusal) and said[-1][0] == b"master":  # and not a replica by now
            self._seen = max(self._seen, len(said[-1][2]))


def judged(replies: list[Reply], wanted: int, said: Sequence[Reply]) -> list[Reply]:
    """The replies to what came before a wait, marked where too few replicas confirmed it."""
    reached = 0 if isinstance(said[-2], Refusal) or isinstance(said[-3], Refusal) else said[-2]
    if reached >= wanted:
        return replies
    return [reply if type(reply) is Refusal else Unconfirmed(reply, wanted, reached) for reply in replies]


class Wire:
    """Connections to one server, shared by threads.

    At most `max_connections` carry packets at a time: a further caller waits for one, at most the deadline.
    Blocking reads have connections of their own.
    """

    def __init__(self, endpoint: Endpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        self._endpoint = endpoint
        self._max_connections = max_connections
        self._acquire_timeout_s = acquire_timeout_s
        self._replicas = Replicas(endpoint.socket_timeout_s)
        self._era, self._counted = 0, -1
        self._watching: Watching | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._idle: deque[Line] = deque()
        self._idle_blocking: deque[Line] = deque()
        self._slots: SimpleQueue[None] = SimpleQueue()  # a token for each packet that may be under way
        for _ in range(self._max_connections):
            self._slots.put(None)
        self._closed = False
        sentinels = self._endpoint.sentinels
        self._watching = None if sentinels is None else Watching(sentinels, self.renew)

    def exchange(self, packet: Packet) -> list[Reply]:
        """Send a packet and read a reply for each command.

        Raises:
            Lost: no reply came.
        """
        return whole(self.carry(packet))

    def carry(self, packet: Packet) -> Carrying:
        """Send a packet, and go on by reading a reply for each command.

        Raises:
            Lost: no reply came.
        """
        if self._pid != os.getpid():
            self._reset()  # a forked child must not share its parent's sockets
        try:
            self._slots.get(timeout=self._acquire_timeout_s)
        except Empty:
            raise Lost(f"all {self._max_connections} connections stayed busy", sent=False) from None
        try:
            return (yield from self._carry_over(self._idle, packet))
        finally:
            self._slots.put(None)

    def block(self, block: Block, *, asking: bool = False) -> list[Reply]:
        """Wait for entries of a stream; one reply.

        Args:
            block: which, and for how long.
            asking: whether a node of a cluster is to look though the slot is still another's.

        Raises:
            Lost: the connection failed.
        """
        if self._pid != os.getpid():
            self._reset()
        packet = blocking(block, self._endpoint.socket_timeout_s, asking=asking)
        return whole(self._carry_over(self._idle_blocking, packet))[-1:]

    def subscribe(self, channels: Sequence[bytes]) -> Any:
        """A connection of its own that hears channels; `None` if the user may not.

        Raises:
            Lost: the connection failed.
        """
        line = self._open()
        permitted = False
        try:
            permitted = are_permitted(_roundtrip(line.connection, subscribing(channels)))
        except (client_errors.RedisError, OSError) as error:
            raise no_reply(error, line.client) from error
        finally:
            if not permitted:
                line.connection.disconnect()
        return line.connection if permitted else None

    def primaries(self, _: Primaries) -> list[tuple[int | None, ...]]:
        """A slot of each node that takes changes; one reply."""
        return [(None,)]

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def renew(self) -> None:
        """Leave every connection, those in use once they are idle: another server has become the primary."""
        self._era += 1
        self._drop(self._idle)
        self._drop(self._idle_blocking)

    def close(self) -> None:
        """Close every connection, those in use once they are idle, and leave an embedded server."""
        self._closed = True
        if self._watching is not None:
            self._watching.close()
        sentinels = self._endpoint.sentinels
        for client in sentinels.clients if sentinels is not None and sentinels.own else ():
            client.close()
        self._drop(self._idle)
        self._drop(self._idle_blocking)
        if self._endpoint.lease is not None:
            self._endpoint.lease.close()

    @staticmethod
    def _drop(idle: deque[Line]) -> None:
        while idle:
            idle.pop().connection.disconnect()

    def _carry_over(self, idle: deque[Line], packet: Packet) -> Carrying:
        if packet.confirm is not None and packet.confirm.replicas is None:
            self._count()
        try:
            line = idle.pop()
        except IndexError:
            line = self._open()
        confirm = packet.confirm
        kills = line.kills(packet.again)
        wanted = 0 if confirm is None else self._replicas.wanted(confirm)
        tail = [] if confirm is None else self._replicas.waiting(confirm, wanted)
        commands = [*kills, *packet.commands, *tail]
        begin, end = len(kills), len(kills) + len(packet.commands)
        try:
            line.connection.send_packed_command([packed(commands)])
            yield
            everything = _replies(line.connection, len(commands))
            replies, said = everything[begin:end], everything[end:]
            if confirm is not None:
                self._replicas.see(said)
                while wanted < self._replicas.wanted(confirm):  # there are more than were waited for
                    wanted = self._replicas.wanted(confirm)
                    said = _roundtrip(line.connection, self._replicas.waiting(confirm, wanted))
                    self._replicas.see(said)
                replies = judged(replies, wanted, said)
        except BaseException as error:
            # A connection with an unread reply must not be used again.
            line.connection.disconnect()
            if not isinstance(error, client_errors.RedisError | OSError):
                raise
            self._drop(idle)  # what broke one connection has most likely broken the idle ones
            raise no_reply(error, line.client) from error
        if line.era != self._era or any(type(reply) is Refusal and reply.code == "READONLY" for reply in replies):
            line.connection.disconnect()  # its server is a replica by now
            return replies
        idle.append(line)
        if self._closed:
            self._drop(idle)
        return replies

    def _count(self) -> None:
        """Ask the Sentinels how many replicas there are: in a failover the primary has lost sight of some."""
        sentinels, era = self._endpoint.sentinels, self._era
        if sentinels is None or self._counted == era:
            return
        counts = []
        for client in sentinels.clients:
            with suppress(client_errors.RedisError, OSError):
                counts.append(len(client.sentinel_slaves(sentinels.name)))
        if not counts:
            raise Lost("no Sentinel says how many replicas there are", sent=False)
        self._replicas.expect(max(counts))
        self._counted = era

    def _open(self) -> Line:
        era = self._era
        connection = self._endpoint.open()
        try:
            connection.connect()
            (client_id,) = _roundtrip(connection, [CLIENT_ID]) if self._endpoint.real_server else [None]
        except (client_errors.RedisError, OSError) as error:
            connection.disconnect()
            raise not_sent(error) from error
        return Line.of(connection, client_id, era)


class Ear:
    """Hears that something was published, while it can: who listens must not depend on it."""

    def __init__(self, subscribe: Callable[[], Any]) -> None:
        """Listen on the connection that `subscribe` returns; never, once it returns `None`."""
        self._subscribe = subscribe
        self._connection: Any = None
        self._permitted = True

    def attend(self) -> None:
        """Listen, if it does not: what is published from now on is heard."""
        if self._connection is None and self._permitted:
            with suppress(Lost):
                self._connection = self._subscribe()
                self._permitted = self._connection is not None

    def hear(self, wait_s: float, stop: threading.Event) -> None:
        """Wait for a message, and what comes right behind it; at most `wait_s` seconds, or until `stop` is set."""
        if self._connection is None:
            stop.wait(wait_s)
            return
        until_s = time.monotonic() + wait_s
        try:
            while (left_s := until_s - time.monotonic()) > 0 and not stop.is_set():
                if self._connection.can_read(timeout=min(left_s, _STOP_WITHIN_S)):
                    self._connection.read_response()
                    until_s = min(until_s, time.monotonic() + SETTLE_S)
        except (client_errors.RedisError, OSError):
            self.close()

    def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


# One step sends, the next reads and returns the replies.
Carrying = Generator[None, None, list[Reply]]


def whole(carrying: Carrying) -> list[Reply]:
    """Carry to the end what was not begun."""
    next(carrying)
    return rest(carrying)


def rest(carrying: Carrying) -> list[Reply]:
    """Carry to the end what was begun."""
    try:
        next(carrying)
    except StopIteration as stop:
        replies: list[Reply] = stop.value
        return replies
    raise AssertionError  # there are just two steps


def _roundtrip(connection: Any, commands: Sequence[Sequence[bytes]]) -> list[Reply]:
    connection.send_packed_command([packed(commands)])
    return _replies(connection, len(commands))


def _replies(connection: Any, count: int) -> list[Reply]:
    replies: list[Reply] = []
    for _ in range(count):
        try:
            replies.append(connection.read_response(disable_decoding=True))
        except client_errors.RedisError as error:
            if not is_refusal(error):
                raise
            replies.append(refusal_of(error))
    return replies
