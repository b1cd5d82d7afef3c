"""What an operation yields, and what carries it out gets: calls, reads, pauses.

An operation is a generator. It yields a `Call`, a `Batch`, a `Read`, a `Block`, `Primaries` or a `Pause` and is
resumed with the reply, or with the error thrown in. It knows no client; `delivery` turns its calls into packets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import attrs

from redisflow.errors import NotDurable
from redisflow.flow import Flow

if TYPE_CHECKING:
    from uuid import UUID

    from redisflow.keys import Partition
    from redisflow.scripts import Script, Source

Reply = Any
_ABSENT = [b"ABSENT"]  # a reply
NO_COPY: Mapping[bytes, bytes] = MappingProxyType({})


@attrs.define(eq=False)  # not frozen: that takes three times as long to make, and every operation makes one
class Call:
    """One run of a script that changes a flow.

    Attributes:
        args: its ARGV after the first two, which are the operation's id and the conditions.
        flow_id: the flow it is about.
        op_id: the operation's id.
        expected: what the stored flow must be: `<revision>` or `<revision> <etag> <updated_at>`; empty for anything.
        narrow: it has only the keys for the status of the caller's copy, and is answered OTHER_KEYS in another.
        owner: act on this owner's flows only; to the script, other owners' flows do not exist. Empty: no restriction.
        copy: hash fields of the flow as the caller has it: its fence, and its etag and `updated_at`, which name the
            operation that made that version. Whatever this call does comes after it. Empty without a copy.
        brought: whether the caller brought the op.
        seen: the key of the flow's index of brought ids, if that tells whether the operation was applied.
        doubtful: whether somebody may have tried the operation before, under an id that the library drew.
        in_trail: whether the operation leaves an event.
        if_deleted: the reply where the flow was deleted since the first attempt, whether another was created under its
            id or not; `None` for a call that is about the id, such as a creation.
        fence: the one that its first attempt knew; noted by delivery.
    """

    script: Script
    slot: int
    keys: Sequence[bytes]
    args: Sequence[bytes]
    flow_id: UUID
    op_id: str
    expected: bytes = b""
    narrow: bool = False
    owner: bytes = b""
    copy: Mapping[bytes, bytes] = NO_COPY
    brought: bool = False
    seen: bytes = b""
    doubtful: bool = False
    in_trail: bool = True
    if_deleted: Reply = _ABSENT
    fence: bytes = b""

    @property
    def subject(self) -> str:
        """What it is about, for errors."""
        return f"flow {self.flow_id}"

    def command(self, source: Source, attempt: bytes, refusal: bytes = b"", *, text: bool = False) -> tuple[bytes, ...]:
        """Build the command.

        Args:
            source: the script's.
            attempt: the flow's fence as it is known; or `=<event id>` where an earlier attempt was applied.
            refusal: the note of the operation's last refusal, as it is known.
            text: send the script's text, not its SHA.
        """
        conditions = b""
        if attempt or refusal or self.expected or self.owner:
            conditions = b"%b|%b|%b|%b" % (attempt, refusal, self.expected, self.owner)
        keys = self.keys
        how = (b"EVAL", source.text) if text else (b"EVALSHA", source.sha)
        return (*how, b"%d" % len(keys), *keys, self.op_id.encode(), conditions, *self.args)


@attrs.frozen(eq=False)
class Batch:
    """Independent calls, sent together. Resumed with one outcome each: a reply, or the error as a value.

    Attributes:
        confirm: whether replicas are waited for as for a single call; a shortfall is an `Unconfirmed`.
    """

    calls: Sequence[Call]
    confirm: bool = False


class Command(NamedTuple):
    """One plain command and the slot it belongs to; `None` where any node will do.

    Attributes:
        script: what it runs by EVALSHA, if it does.
        about: what it is about, for errors; by default its own first words.
    """

    slot: int | None
    args: tuple[bytes, ...]
    script: Script | None = None
    about: bytes = b""

    @property
    def subject(self) -> str:
        """What it is about, for errors."""
        return (self.about or b" ".join(self.args[:2])).decode(errors="replace")


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
    """Wait at most `wait_s` seconds for entries of a stream after an id. Resumed with the new entries.

    Attributes:
        again: set between delivery and the wires.
    """

    slot: int
    stream: bytes
    after: bytes
    wait_s: float
    again: Again | None = None


@attrs.frozen(eq=False)
class Primaries:
    """Ask for the nodes that take changes. Resumed with a slot of each; with `None` for a lone server.

    Attributes:
        again: set between delivery and the wires.
    """

    again: Again | None = None


@attrs.frozen(eq=False)
class Together:
    """Share one run of some steps among all callers that want the same at the same time.

    Attributes:
        key: what is wanted.
        items: this caller's part of it.
        run: makes the steps from the items of all callers that wait. Resumed with their result.
        until_s: the caller's deadline, in monotonic seconds.
    """

    key: Hashable
    items: Sequence[Any]
    run: Callable[[Sequence[Any]], Generator[Any, Any, Any]]
    until_s: float


@attrs.frozen(eq=False)
class Pause:
    """Do nothing for some seconds. Resumed with `None`."""

    seconds: float


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Op = Generator[Any, Any, T]


def command(place: Partition | int | None, *args: bytes | int) -> Command:
    """Build a plain command for the node of a partition or of a slot; `None` is any."""
    encoded = tuple(b"%d" % arg if isinstance(arg, int) else arg for arg in args)
    return Command(place if place is None or isinstance(place, int) else place.slot, encoded)


class Pages(Protocol[T_co]):
    """Something read page by page."""

    def next_page(self) -> Op[Sequence[T_co] | None]:
        """Yield the calls for the next page; return its items, `None` after the last."""


# --- between delivery and the wires --------------------------------------------------------------------


class Packet(NamedTuple):
    """Commands that are written at once, to each node its own. Resumed with one reply each.

    An error reply is a `Refusal`. Where just one of several nodes gave no reply, it is a `Lost`.

    Attributes:
        slots: where each command belongs; `None` where any node will do.
        until_s: monotonic seconds: when who sends it waits no longer.
        again: what earlier attempts came to; `None` for a first one.
        confirm: the replicas to wait for behind the commands; `None` for none.
    """

    slots: Sequence[int | None]
    commands: Sequence[Sequence[bytes]]
    until_s: float
    again: Again | None = None
    confirm: Confirm | None = None


@attrs.frozen
class Confirm:
    """Wait until replicas have what was written.

    Attributes:
        replicas: how many; `None` for all.
        within_s: seconds.
        flow_keys: those of the commands' flows. A resend that finds what its first attempt did writes nothing, and
            newer servers then wait for nothing: so there is a write of its own to wait for, to one of these keys.
        asking: whether the node is to take it though the slot is still another's.
        at_least: how many replicas the primary is known to have, where all are to be waited for.
    """

    replicas: int | None
    within_s: float
    flow_keys: Sequence[bytes] = ()
    asking: bool = False
    at_least: int = 0


class Unconfirmed(NamedTuple):
    """A reply to what fewer replicas have confirmed than were wanted."""

    reply: Reply
    wanted: int
    reached: int

    def error(self, result: object, op_id: str) -> NotDurable:
        """Return what to raise for an operation with this result."""
        parts = result if isinstance(result, tuple) else (result,)
        flow = next((part for part in parts if isinstance(part, Flow)), None)
        return NotDurable(op_id, flow, self.wanted, self.reached)


@attrs.frozen
class Again:
    """What earlier attempts came to.

    Attributes:
        silent: servers that did not answer, as `host:port`.
        redirects: for each command the refusal that says which node it belongs to, `None` for no such.
    """

    silent: Collection[str]
    redirects: Sequence[Refusal | None]


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
        server: the one that did not answer, as `host:port`; empty if that is not known.
        lasting: whether trying again is of no use, as with a wrong password.
        code: that of the refusal it comes from; empty where no server said anything.
    """

    def __init__(self, message: str, *, sent: bool, lasting: bool = False, server: str = "", code: str = "") -> None:
        super().__init__(message)
        self.sent = sent
        self.server = server
        self.lasting = lasting
        self.code = code
