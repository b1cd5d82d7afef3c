"""What an operation yields, and what carries it out gets: calls, reads, pauses.

An operation is a generator. It yields a `Call`, a `Batch`, a `Read`, a `Block` or a `Pause` and is resumed with
the reply, or with the error thrown in. It knows no client; `delivery` turns its calls into packets.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import attrs

if TYPE_CHECKING:
    from uuid import UUID

    from redisflow.keys import Partition
    from redisflow.scripts import Script, Source

Reply = Any


@attrs.define(eq=False)  # not frozen: that takes three times as long to make, and every operation makes one
class Call:
    """One run of a script.

    Attributes:
        args: its ARGV behind the first two, which are the operation's id and the conditions.
        flow_id: the flow it is about.
        op_id: the operation's id.
        look: `deep` where the caller brought the op, so that even a first attempt looks for it.
        expected: what the stored flow must be: `<revision>` or `<revision> <etag>`; empty for anything.
        narrow: it has just the keys for the status of the caller's copy, and is answered OTHER_KEYS in another.
    """

    script: Script
    slot: int
    keys: Sequence[bytes]
    args: Sequence[bytes]
    flow_id: UUID
    op_id: str
    look: bytes = b""
    expected: bytes = b""
    narrow: bool = False

    @property
    def subject(self) -> str:
        """What it is about, for errors."""
        return f"flow {self.flow_id}"

    def command(self, source: Source, span_ms: int | None = None, *, text: bool = False) -> tuple[bytes, ...]:
        """The command of a first attempt, or of a resend `span_ms` milliseconds after it."""
        conditions = b""
        if span_ms is not None:
            conditions = b"%b%d|%b" % (self.look, span_ms, self.expected)
        elif self.look or self.expected:
            conditions = b"%b|%b" % (self.look, self.expected)
        keys = self.keys
        how = (b"EVAL", source.text) if text else (b"EVALSHA", source.sha)
        return (*how, b"%d" % len(keys), *keys, self.op_id.encode(), conditions, *self.args)


@attrs.frozen(eq=False)
class Batch:
    """Independent calls, sent together. Resumed with one outcome each: a reply, or the error as a value."""

    calls: Sequence[Call]


class Command(NamedTuple):
    """One plain command and the slot it belongs to; `None` where any node will do."""

    slot: int | None
    args: tuple[bytes, ...]


@attrs.frozen(eq=False)
class Read:
    """Commands that change nothing that matters twice, sent together. Resumed with their replies.

    Attributes:
        tolerant: resumed with a FlowError as a value where the server refuses a command.
        insist: ask again where the server cannot answer just now.
    """

    commands: Sequence[Command]
    tolerant: bool = False
    insist: bool = True


@attrs.frozen(eq=False)
class Block:
    """Wait at most `wait_s` seconds for entries of a stream after an id. Resumed with the new entries."""

    slot: int
    stream: bytes
    after: bytes
    wait_s: float


@attrs.frozen(eq=False)
class Pause:
    """Do nothing for some seconds. Resumed with `None`."""

    seconds: float


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Op = Generator[Any, Any, T]


def command(partition: Partition | None, *args: bytes | int) -> Command:
    """Build a plain command for a partition's node."""
    encoded = tuple(b"%d" % arg if isinstance(arg, int) else arg for arg in args)
    return Command(None if partition is None else partition.slot, encoded)


class Pages(Protocol[T_co]):
    """Something read page by page."""

    def next_page(self) -> Op[Sequence[T_co] | None]:
        """Yield the calls for the next page; return its items, `None` after the last."""


# --- between delivery and the wires --------------------------------------------------------------------


class Packet(NamedTuple):
    """Commands for one node, written at once. Resumed with one reply each; an error reply is a `Refusal`.

    Attributes:
        until_s: monotonic seconds: when who sends it waits no longer.
    """

    slot: int | None
    commands: Sequence[Sequence[bytes]]
    until_s: float


@attrs.frozen
class Refusal:
    """An error reply: the command was not executed, or a script failed.

    Attributes:
        code: the first word of the server's error, such as READONLY.
        message: all of it.
    """

    code: str
    message: str


class Lost(Exception):
    """No reply came; the client's own error is the `__cause__`.

    Attributes:
        sent: whether the packet may have reached the server.
        client_id: what the server calls the connection that was lost, if that is known.
        lasting: whether trying again is of no use, as with a wrong password.
    """

    def __init__(self, message: str, *, sent: bool, lasting: bool = False, client_id: int | None = None) -> None:
        super().__init__(message)
        self.sent = sent
        self.client_id = client_id
        self.lasting = lasting
