"""What both managers are set up with."""

from __future__ import annotations

import re
from typing import Any

import attrs

from redisflow.calls import Confirm
from redisflow.delivery import Policy
from redisflow.errors import InvalidData, shown
from redisflow.ops.namespace import DEFAULT_MAX_PAYLOAD_BYTES, LONGEST_S, Namespace
from redisflow.scripts import Appending

_REPLICAS = re.compile(r"replicas:([1-9][0-9]?)")
_LEAST_EVENTS, _MOST_EVENTS = 100, 2**63 - 1  # what lua/include/look_back.lua reads at least; what XADD takes


def _positive(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LONGEST_S:
        raise InvalidData(f"{attribute.name} must be a number above 0, and at most {LONGEST_S}, not {shown(value)}")


def _whole(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidData(f"{attribute.name} must be a whole number, 1 or more, not {shown(value)}")


def _trail(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value > _MOST_EVENTS):
        raise InvalidData(f"{attribute.name} must be a whole number of 64 bits, or None, not {shown(value)}")
    if value is not None and value < _LEAST_EVENTS:
        raise InvalidData(
            f"{attribute.name} must be {_LEAST_EVENTS} or more, not {shown(value)}: a resend looks through the last "
            f"{_LEAST_EVENTS} events for what its first attempt did"
        )


def confirm_of(durability: object, within_s: float) -> Confirm | None:
    """What each change waits for.

    Raises:
        InvalidData: not `local`, `replicas:N` or `all`.
    """
    if durability == "local":
        return None
    if durability == "all":
        return Confirm(None, within_s)
    if isinstance(durability, str) and (match := _REPLICAS.fullmatch(durability)):
        return Confirm(int(match[1]), within_s)
    raise InvalidData(
        f"durability must be 'local', 'replicas:N' with N from 1 to 99, or 'all', not {shown(durability)}"
    )


def _durability(instance: Settings, _: object, value: object) -> None:
    confirm_of(value, instance.confirm_within_s)


@attrs.frozen(kw_only=True)
class Settings:
    """The options of a manager.

    Attributes:
        prefix: the namespace: 1 to 64 characters of `A-Za-z0-9_.-`.
        partitions: how many parts a new namespace is spread over; `None` takes what the namespace has, 16 for a
            new one.
        deadline_s: seconds for which a call is tried again before it gives up.
        max_payload_bytes: limit of what one call may store, encoded.
        event_maxlen: about how many events of a flow are kept where this manager adds one, 100 or more; `None` for all.
        max_connections: how many connections may carry calls at once; a further call waits. In asyncio this is for
            large calls: small ones share a connection, up to 4,096 at a time.
        durability: when a change has succeeded: `local`, the server has it; `replicas:N`, N of its replicas have it
            too; `all`, all of them have, and there is one.
        confirm_within_s: seconds for which a change waits for its replicas, before it raises NotDurable.
        allow_eviction: connect even to a server that may evict flows.
    """

    prefix: str = "redisflow"
    partitions: int | None = None
    deadline_s: float = attrs.field(default=15.0, validator=_positive)
    max_payload_bytes: int = attrs.field(default=DEFAULT_MAX_PAYLOAD_BYTES, validator=_whole)
    event_maxlen: int | None = attrs.field(default=None, validator=_trail)
    max_connections: int = attrs.field(default=50, validator=_whole)
    confirm_within_s: float = attrs.field(default=1.0, validator=_positive)
    durability: str = attrs.field(default="local", validator=_durability)
    allow_eviction: bool = False

    def namespace(self) -> Namespace:
        """The namespace these options name."""
        appending = Appending.keeping(self.event_maxlen)
        return Namespace(self.prefix, self.partitions, self.max_payload_bytes, appending)

    def policy(self, *, real_server: bool, cluster: bool) -> Policy:
        """How calls are delivered under these options."""
        policy = Policy(self.deadline_s, plain_scripts=not real_server, cluster=cluster)
        return self.confirming(policy, self.durability)

    def confirming(self, policy: Policy, durability: str) -> Policy:
        """The policy with what changes wait for.

        Raises:
            InvalidData: there is nobody to wait for.
        """
        confirm = confirm_of(durability, self.confirm_within_s)
        if confirm is not None and policy.plain_scripts:
            raise InvalidData(f"durability={durability!r} needs a real server: memory:// has no replicas")
        return attrs.evolve(policy, confirm=confirm)
