"""Carries packets over redis-py connections, for the sync manager: one packet, one connection, in order."""

from __future__ import annotations

import logging
import math
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
from redis.sentinel import MasterNotFoundError

from redisflow.calls import Block, Confirm, Lost, Packet, Primaries, Refusal, Reply, Unconfirmed
from redisflow.delivery import PASSING, REDIRECTS

try:
    import hiredis

    pack_command: Callable[[Any], bytes] = hiredis.pack_command
except ImportError:  # no wheel for this machine: redis-py then reads replies in Python, too

    def pack_command(command: Any) -> bytes:
        """The bytes of a command, as the protocol has them."""
        return b"".join([b"*%d\r\n" % len(command), *[b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in command]])


from redisflow.sentinel import Sentinels, Watching
from redisflow.singleflight import Gathering, SingleFlight

if TYPE_CHECKING:
    from redisflow.connection import Endpoint

log = logging.getLogger("redisflow")

MAX_BLOCK_S = 2.0
_STOP_WITHIN_S = 0.1  # how soon a thread that listens sees that it should stop
COUNT_EVERY_S = 2.0  # at most so old is the number of replicas that a change waits for, where it waits for all
SETTLE_S = 0.005  # messages come in bursts, and one look is enough for each
_SHARE_TO_WAIT = 0.9  # of the time left for a packet: its reply must be back before that is over
NO_SENTINEL_ANSWERS = "no Sentinel answers"
NO_SENTINEL_COUNTS = "no Sentinel says how many replicas there are"
ASKING = (b"ASKING",)
# Writes to a key and leaves it as it was: something to wait for, whatever the commands before it found to do.
_TOUCH = b"""#!lua flags=allow-oom
local ttl_ms = redis.call('PTTL', KEYS[1])
if ttl_ms == -2 then
  redis.call('HSET', KEYS[1], 'gone', '1')
  redis.call('UNLINK', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ttl_ms > 0 and ttl_ms or 86400000)
  if ttl_ms == -1 then
    redis.call('PERSIST', KEYS[1])
  end
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
_LASTING = (client_errors.AuthenticationError, client_errors.AuthorizationError, client_errors.NoPermissionError)


class Line(NamedTuple):
    """An open connection, and the server it leads to, as `host:port` or a path."""

    connection: Any
    server: str
    era: int  # of the wire's, when it was opened

    @classmethod
    def of(cls, connection: Any, era: int) -> Line:
        """Note where a connection leads."""
        host = getattr(connection, "host", None)
        return cls(connection, f"{host}:{connection.port}" if host else str(getattr(connection, "path", "")), era)


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


def not_sent(error: Exception, why: str = "cannot connect") -> Lost:
    """The loss of a packet that never left, because no connection could be had."""
    lasting = isinstance(error, _LASTING) or isinstance(error.__context__, ssl.SSLCertVerificationError)
    code, said = "", _said(error)
    if is_refusal(error):
        refusal = refusal_of(error)
        code, said = refusal.code, refusal.message
    lost = Lost(f"{why}: {said}", sent=False, lasting=lasting, code=code)
    lost.__cause__ = error
    return lost


def no_reply(error: Exception, server: str) -> Lost:
    """The loss of a packet that may have been executed."""
    lost = Lost(f"no reply: {_said(error)}", sent=True, server=server)
    lost.__cause__ = error
    return lost


def _said(error: Exception) -> str:
    return str(error) or "the deadline passed"  # what asyncio's own timeout does not say


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
    """The replicas of a server, as far as was seen."""

    def __init__(self, socket_timeout_s: float) -> None:
        self._longest_s = socket_timeout_s / 2  # of one command that waits: a longer silence would look like a loss
        self._seen = 1  # to wait for all where there are none would promise nothing
        self._counted_s = -math.inf
        self.are_known = False  # whether they were counted since the last change of primaries

    def forget(self) -> None:
        """Have them counted before anything waits for them: another server has become the primary."""
        self._counted_s, self.are_known = -math.inf, False

    def recount(self) -> None:
        """Have them counted soon: one may have joined."""
        self._counted_s = -math.inf

    def must_be_counted(self, confirm: Confirm | None) -> bool:
        """Tell whether a change that waits for all of them has to ask how many there are."""
        is_old = time.monotonic() > self._counted_s + COUNT_EVERY_S
        return is_old and confirm is not None and confirm.replicas is None

    def note_asked(self) -> None:
        """Note that they are being counted."""
        self._counted_s = time.monotonic()

    def expect(self, count: int) -> None:
        """Take in how many there are, connected or not."""
        self._seen, self.are_known = max(1, count), True

    def see(self, connected: int) -> None:
        """Take in how many are connected."""
        self._seen = max(self._seen, connected)

    def wanted(self, confirm: Confirm) -> int:
        """How many to wait for."""
        return max(self._seen, confirm.at_least) if confirm.replicas is None else confirm.replicas

    def wait(self, confirm: Confirm, until_s: float) -> Wait:
        """The wait behind commands that are to be answered by a time."""
        now_s = time.monotonic()
        return Wait(self, confirm, now_s + min(confirm.within_s, _SHARE_TO_WAIT * (until_s - now_s)), self._longest_s)


class Wait:
    """A wait for replicas behind commands: what to send, again and again, and what came of it."""

    def __init__(self, replicas: Replicas, confirm: Confirm, until_s: float, longest_s: float) -> None:
        self._replicas = replicas
        self._confirm = confirm
        self._until_s = until_s
        self._longest_s = longest_s
        self._wanted = replicas.wanted(confirm)
        self._reached = 0
        self._doubt: str | None = None  # why what was waited for may not be where it will be read

    def commands(self) -> list[tuple[bytes, ...]]:
        """Those to send now."""
        wait_s = min(self._until_s - time.monotonic(), self._longest_s)
        return [
            *([ASKING] if self._confirm.asking else []),
            (b"EVAL", _TOUCH, b"1", self._confirm.flow_keys[-1]),
            (b"WAIT", b"%d" % self._wanted, b"%d" % max(1, int(1000 * wait_s))),
            (b"ROLE",),
        ]

    def goes_on(self, said: Sequence[Reply], *, renewed: bool) -> bool:
        """Take in the replies, of a server that has been replaced if `renewed`. Returns whether to wait again."""
        _, reached, role = said[-3:]
        refusal = next((reply for reply in said[-3:] if isinstance(reply, Refusal)), None)
        if refusal is not None:
            self._reached = 0
            self._doubt = refusal.message if refusal.code in PASSING | REDIRECTS else None
            return False
        if role[0] == b"master":  # and not a replica by now
            self._replicas.see(len(role[2]))
        self._reached, waited_for, self._wanted = reached, self._wanted, self._replicas.wanted(self._confirm)
        if reached >= waited_for:
            return self._wanted > waited_for  # there are more than were waited for
        if renewed:
            self._doubt = "another server has become the primary"
        return self._doubt is None and time.monotonic() < self._until_s

    def judged(self, replies: list[Reply]) -> list[Reply]:
        """The replies to what came before, marked if too few replicas have it; lost, if another server knows better."""
        if self._doubt is None and self._reached >= self._wanted:
            return replies
        found: Reply = None
        if self._doubt is not None:
            found = Lost(f"its replicas could not be waited for: {self._doubt}", sent=True)
        return [
            reply if type(reply) is Refusal else found or Unconfirmed(reply, self._wanted, self._reached)
            for reply in replies
        ]


def counted(told: Sequence[Any]) -> int:
    """How many replicas there are, by what Sentinels said, or failed with.

    Raises:
        Lost: none said.
    """
    counts = [len(replicas) for replicas in told if not isinstance(replicas, BaseException)]
    if not counts:
        raise not_sent(told[0], NO_SENTINEL_COUNTS)
    return max(counts)


def unnamed(name: str, told: Sequence[Any]) -> Lost:
    """The loss of what is for a primary that no Sentinel names, by what they said of all, or failed with."""
    if all(isinstance(answer, BaseException) for answer in told):
        return not_sent(told[0], NO_SENTINEL_ANSWERS)
    return Lost(f"no Sentinel knows a primary {name!r} that is up", sent=False)


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
        self._era = 0
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
        self.gathering = Gathering()
        self._finding = SingleFlight[Any](self._find, failing=NO_SENTINEL_ANSWERS)
        self._counting = SingleFlight[None](self._count, failing=NO_SENTINEL_COUNTS)
        sentinels = self._endpoint.sentinels
        self._watching = None if sentinels is None else Watching(sentinels, self.renew, self._replicas.recount)

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
        line = self._open(time.monotonic() + self._endpoint.socket_timeout_s)
        permitted = False
        try:
            permitted = are_permitted(_roundtrip(line.connection, subscribing(channels)))
        except (client_errors.RedisError, OSError) as error:
            raise no_reply(error, line.server) from error
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
        self._replicas.forget()
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
        confirm, sentinels = packet.confirm, self._endpoint.sentinels
        if sentinels is not None and self._replicas.must_be_counted(confirm):
            self._count_replicas(packet.until_s, sentinels)
        try:
            line = idle.pop()
        except IndexError:
            line = self._open(packet.until_s)
        wait = None if confirm is None else self._replicas.wait(confirm, packet.until_s)
        commands = [*packet.commands, *(() if wait is None else wait.commands())]
        count = len(packet.commands)
        try:
            line.connection.send_packed_command([packed(commands)])
            yield
            everything = _replies(line.connection, len(commands))
            replies, said = everything[:count], everything[count:]
            if wait is not None:
                while wait.goes_on(said, renewed=line.era != self._era):
                    said = _roundtrip(line.connection, wait.commands())
                replies = wait.judged(replies)
        except BaseException as error:
            # A connection with an unread reply must not be used again.
            line.connection.disconnect()
            if not isinstance(error, client_errors.RedisError | OSError):
                raise
            self._drop(idle)  # what broke one connection has most likely broken the idle ones
            raise no_reply(error, line.server) from error
        if line.era != self._era or any(type(reply) is Refusal and reply.code == "READONLY" for reply in replies):
            line.connection.disconnect()  # its server is a replica by now
            return replies
        idle.append(line)
        if self._closed:
            self._drop(idle)
        return replies

    def _find(self, sentinels: Sentinels) -> Any:
        """Ask the Sentinels for the primary's address."""
        try:
            return sentinels.asker.discover_master(sentinels.name)
        except MasterNotFoundError as error:  # it has just the kinds of the Sentinels' errors
            raise unnamed(sentinels.name, self._told(sentinels, "sentinel_masters")) from error
        except (client_errors.RedisError, OSError) as error:
            raise not_sent(error, NO_SENTINEL_ANSWERS) from error

    def _count_replicas(self, until_s: float, sentinels: Sentinels) -> None:
        """Ask the Sentinels how many replicas there are. If none answers, what was known before holds."""
        try:
            self._counting(until_s, sentinels)
        except Lost:
            if not self._replicas.are_known:
                raise

    def _count(self, sentinels: Sentinels) -> None:
        """Ask the Sentinels how many replicas there are: in a failover the primary has lost sight of some."""
        self._replicas.note_asked()
        self._replicas.expect(counted(self._told(sentinels, "sentinel_slaves", sentinels.name)))

    @staticmethod
    def _told(sentinels: Sentinels, question: str, *args: str) -> list[Any]:
        """What each of the Sentinels answers, or the error instead."""
        told: list[Any] = []
        for client in sentinels.clients:
            try:
                told.append(getattr(client, question)(*args))
            except (client_errors.RedisError, OSError) as error:
                told.append(error)
        return told

    def _open(self, until_s: float) -> Line:
        era = self._era
        connection, sentinels = self._endpoint.open(), self._endpoint.sentinels
        primary = None if sentinels is None else self._finding(until_s, sentinels)
        try:
            connection.connect() if primary is None else connection.connect_to(primary)
        except (client_errors.RedisError, OSError) as error:
            connection.disconnect()
            raise not_sent(error) from error
        return Line.of(connection, era)


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
