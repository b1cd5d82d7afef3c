"""Which node of a cluster has which slot, as far as is known: pure bookkeeping, for the sync and the asyncio wire."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import attrs

from redisflow.calls import Again, Lost, Packet, Refusal, Reply
from redisflow.keys import SLOTS
from redisflow.wire import ASKING

Address = tuple[str, int]
Remap = Callable[[Address], Address]

SLOTS_COMMAND = (b"CLUSTER", b"SLOTS")


class Part(NamedTuple):
    """The commands of a packet that go to one node.

    Attributes:
        numbers: which of the packet's commands they are.
        asking: whether the node is to take them though the slot is still another's.
        replicas: how many the node is known to have.
    """

    address: Address
    numbers: Sequence[int]
    asking: bool
    replicas: int = 0

    def packet(self, whole: Packet) -> Packet:
        """The packet for the node."""
        slots, commands = [whole.slots[n] for n in self.numbers], [whole.commands[n] for n in self.numbers]
        if self.asking:
            slots = [slot for slot in slots for _ in range(2)]
            commands = [command for wanted in commands for command in (ASKING, wanted)]
        confirm = whole.confirm
        if confirm is not None:
            flow_keys = [confirm.flow_keys[n] for n in self.numbers]
            confirm = attrs.evolve(confirm, flow_keys=flow_keys, asking=self.asking, at_least=self.replicas)
        return whole._replace(slots=slots, commands=commands, confirm=confirm)

    def place(self, replies: Sequence[Reply], into: list[Reply]) -> None:
        """Put the node's replies where they belong."""
        for number, reply in zip(self.numbers, replies[1::2] if self.asking else replies, strict=True):
            into[number] = reply

    def lose(self, lost: Lost, into: list[Reply]) -> None:
        """Put the loss where replies should have been."""
        for number in self.numbers:
            into[number] = lost


class Topology:
    """The owners of slots: what `CLUSTER SLOTS` said, and what refusals have said since."""

    def __init__(self, seeds: Sequence[Address], remap: Remap | None) -> None:
        """Begin with the nodes the caller named, and how addresses the cluster tells are to be understood."""
        self._seeds = seeds
        self._remap = remap
        self._owners: list[Address | None] = [None] * SLOTS
        self._nodes: dict[Address, int] = {}  # in the order told, with the number of replicas; of a replica -1
        self._asked_s = -math.inf
        self.known = False

    def note_asked(self) -> None:
        """Note that nodes are being asked."""
        self._asked_s = time.monotonic()

    def is_old(self, after_s: float) -> bool:
        """Tell whether nobody has been asked for so many seconds."""
        return time.monotonic() > self._asked_s + after_s

    def take(self, ranges: Sequence[Any], told_by: Address) -> None:
        """Take in a reply to `CLUSTER SLOTS`."""
        owners: list[Address | None] = [None] * SLOTS
        nodes: dict[Address, int] = {}
        for first, last, *told in ranges:
            primary, *replicas = [self._address(host, port, told_by) for host, port, *_ in told]
            owners[first : last + 1] = [primary] * (last + 1 - first)
            nodes |= dict.fromkeys(replicas, -1) | {primary: len(replicas)}
        self._owners, self._nodes = owners, nodes
        self.known = True

    def learn(self, again: Again) -> None:
        """Take in where refusals say that slots have moved."""
        for redirect in again.redirects:
            if redirect is not None and redirect.code == "MOVED":
                slot, address = self._target(redirect)
                self._owners[slot] = address
                self._nodes.setdefault(address, 0)

    def owner(self, slot: int | None) -> Address | None:
        """The node that has a slot; any that takes changes, for `None`."""
        if slot is not None:
            return self._owners[slot]
        primaries = [address for address, replicas in self._nodes.items() if replicas >= 0]
        return random.choice(primaries) if primaries else None  # noqa: S311 - spreads load, guards nothing

    def parts(self, slots: Sequence[int | None], again: Again | None) -> Iterator[Part]:
        """Part the commands of a packet by node. Those whose slot nobody has are left out."""
        anyone = self.owner(None)
        parts: dict[tuple[Address, bool], list[int]] = {}
        for number, slot in enumerate(slots):
            redirect = None if again is None else again.redirects[number]
            asking = redirect is not None and redirect.code == "ASK"
            if redirect is not None and asking:
                _, owner = self._target(redirect)
            elif (known := anyone if slot is None else self._owners[slot]) is not None:
                owner = known
            else:
                continue
            parts.setdefault((owner, asking), []).append(number)
        for (address, asking), numbers in parts.items():
            yield Part(address, numbers, asking, max(0, self._nodes.get(address, 0)))

    def place(self, slot: int, again: Again | None) -> Part | None:
        """Where a single command goes."""
        return next(self.parts([slot], again), None)

    def primaries(self) -> tuple[int, ...]:
        """A slot of each node that has any."""
        slots: dict[Address, int] = {}
        for slot, owner in enumerate(self._owners):
            if owner is not None:
                slots.setdefault(owner, slot)
        return tuple(slots.values())

    def nodes(self) -> Collection[Address]:
        """Every node that was told of."""
        return self._nodes.keys()

    def informants(self, again: Again | None) -> list[Address]:
        """Whom to ask for the topology, one after the other: those that did not answer lately last."""
        failed = set() if again is None else again.silent
        nodes = random.sample(list(self._nodes), len(self._nodes))
        asked = dict.fromkeys([*nodes, *self._seeds])
        return sorted(asked, key=lambda address: "{}:{}".format(*address) in failed)

    def _target(self, redirect: Refusal) -> tuple[int, Address]:
        """The slot and the node a refusal names, as in `MOVED 3999 127.0.0.1:6381`."""
        _, slot, target = redirect.message.split()[:3]
        host, _, port = target.rpartition(":")
        known = self._owners[int(slot)]
        return int(slot), self._address(host, int(port), known or self._seeds[0])

    def _address(self, host: bytes | str | None, port: int, told_by: Address) -> Address:
        """A node's address. One without a host is on the host of the node that told of it."""
        name = host.decode() if isinstance(host, bytes) else host
        address = (name if name and name != "?" else told_by[0], port)
        return self._remap(address) if self._remap is not None else address


def uncovered(slot: int | None) -> Refusal:
    """What a cluster says of a slot that no node has."""
    return Refusal("CLUSTERDOWN", f"CLUSTERDOWN no node has slot {slot}")


def no_cluster(refusal: Refusal) -> Lost:
    """The loss of what was meant for a cluster, and the server is none or does not say."""
    message = f"cannot learn the nodes of the cluster: {refusal.message}"
    return Lost(message, sent=False, lasting=True, code=refusal.code)
