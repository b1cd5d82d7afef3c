"""Carries packets to the nodes of a cluster, for the sync manager: a `Wire` for each node."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from redisflow.calls import Again, Block, Confirm, Lost, Packet, Primaries, Refusal, Reply
from redisflow.singleflight import Gathering, SingleFlight
from redisflow.topology import SLOTS_COMMAND, Address, Part, Topology, no_cluster, uncovered
from redisflow.wire import COUNT_EVERY_S, Carrying, Wire, rest

if TYPE_CHECKING:
    from redisflow.connection import ClusterEndpoint, Endpoint

LOOK_EVERY_S = 0.1  # at most so often the nodes are asked who has what
ANSWER_WITHIN_S = 1.0  # or another node is asked
NO_NODE_ANSWERS = "no node of the cluster answers"


def must_count(confirm: Confirm | None) -> bool:
    """Tell whether a packet waits for all replicas, so that it matters how many there are."""
    return confirm is not None and confirm.replicas is None


class ClusterWire:
    """Connections to the nodes of a cluster, shared by threads."""

    def __init__(self, cluster: ClusterEndpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        self._cluster = cluster
        self._wire_to = partial(Wire, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s)
        self._topology = Topology(cluster.seeds, cluster.remap)
        self._wires: dict[Address, Wire] = {}
        self._lock = threading.Lock()
        self.gathering = Gathering()
        self._looking = SingleFlight[None](self._ask_around, failing=NO_NODE_ANSWERS, slack_s=LOOK_EVERY_S)
        self._wire_of: dict[int | None, Wire] = {}  # by slot, as long as the topology stays

    def exchange(self, packet: Packet) -> list[Reply]:
        """Send the commands of a packet to their nodes and read a reply for each.

        Raises:
            Lost: no node could be asked where they belong, or the one node they belong to gave no reply.
        """
        slots = packet.slots
        if packet.again is None and len(slots) == 1 and packet.confirm is None:
            wire = self._wire_of.get(slots[0])
            if wire is not None:
                return wire.exchange(packet)
        self._look(packet.again, packet.until_s, counts=must_count(packet.confirm))
        replies: list[Reply] = [uncovered(slot) for slot in packet.slots]
        # In one order, or two threads could each hold the last connection that the other waits for; and for the same
        # reason one connection to each node at a time.
        parts = sorted(self._topology.parts(slots, packet.again))
        if len(slots) == 1 and parts and not parts[0].asking and slots[0] is not None:
            self._wire_of[slots[0]] = self._at(parts[0].address)
        for asking in (False, True):
            self._carry([part for part in parts if part.asking is asking], packet, replies)
        return replies

    def _carry(self, parts: Sequence[Part], packet: Packet, replies: list[Reply]) -> None:
        """Send to all the nodes, then read from each."""
        under_way: list[tuple[Part, Carrying]] = []
        for part in parts:
            carrying = self._at(part.address).carry(part.packet(packet))
            try:
                next(carrying)
            except Lost as lost:
                part.lose(lost, replies)
            else:
                under_way.append((part, carrying))
        for part, carrying in under_way:
            try:
                part.place(rest(carrying), replies)
            except Lost as lost:
                part.lose(lost, replies)

    def block(self, block: Block) -> list[Reply]:
        """Wait for entries of a stream; one reply.

        Raises:
            Lost: the connection failed.
        """
        self._look(block.again)
        part = self._topology.place(block.slot, block.again)
        return [uncovered(block.slot)] if part is None else self._at(part.address).block(block, asking=part.asking)

    def subscribe(self, channels: Sequence[bytes]) -> Any:
        """A connection of its own that hears channels, on any node: a message reaches them all.

        Raises:
            Lost: the connection failed.
        """
        self._look(None)
        address = self._topology.owner(None)
        return self._at(address or self._cluster.seeds[0]).subscribe(channels)

    def primaries(self, primaries: Primaries) -> list[tuple[int, ...]]:
        """A slot of each node that takes changes; one reply."""
        self._look(primaries.again)
        return [self._topology.primaries()]

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close every connection, those in use once they are idle."""
        with self._lock:
            wires = list(self._wires.values())
            self._wires.clear()
            self._wire_of.clear()
        for wire in wires:
            wire.close()

    def _at(self, address: Address) -> Wire:
        with self._lock:
            wire = self._wires.get(address)
            if wire is None:
                wire = self._wires[address] = self._wire_to(self._cluster.endpoint_at(address))
            return wire

    def _look(self, again: Again | None, until_s: float = math.inf, *, counts: bool = False) -> None:
        """Ask who has what, if nothing is known or what is known did not serve.

        Args:
            again: what earlier attempts came to.
            until_s: the deadline, in monotonic seconds.
            counts: ask also if the number of replicas that is known is old.

        Raises:
            Lost: no node said, and nothing is known.
        """
        if again is not None:
            self._topology.learn(again)
            self._wire_of.clear()
        elif self._topology.known and not (counts and self._topology.is_old(COUNT_EVERY_S)):
            return
        try:
            self._looking(until_s, again)
        except Lost:
            if again is not None or not self._topology.known:
                raise

    def _ask_around(self, again: Again | None) -> None:
        self._topology.note_asked()
        failure = Lost(NO_NODE_ANSWERS, sent=False)
        for address in self._topology.informants(again):
            try:
                packet = Packet((None,), (SLOTS_COMMAND,), time.monotonic() + ANSWER_WITHIN_S)
                (reply,) = self._at(address).exchange(packet)
            except Lost as lost:
                message = f"{NO_NODE_ANSWERS}: {lost}"
                failure = Lost(message, sent=False, lasting=lost.lasting, code=lost.code)
                failure.__cause__ = lost.__cause__
                continue
            if not isinstance(reply, Refusal):
                self._topology.take(reply, address)
                return self._drop_the_gone()
            failure = no_cluster(reply)
        raise failure

    def _drop_the_gone(self) -> None:
        self._wire_of.clear()
        with self._lock:
            gone = [self._wires.pop(address) for address in self._wires.keys() - self._topology.nodes()]
        for wire in gone:
            wire.close()


def wire_to(
    endpoint: Endpoint | ClusterEndpoint, *, max_connections: int, acquire_timeout_s: float
) -> Wire | ClusterWire:
    """The wire for an endpoint."""
    kind: Any = ClusterWire if endpoint.is_cluster else Wire
    wire: Wire | ClusterWire = kind(endpoint, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s)
    return wire
