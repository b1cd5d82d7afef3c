"""Which node a command goes to: no server, no socket."""

from __future__ import annotations

from typing import Any

import pytest

from redisflow.calls import Again, Confirm, Lost, Packet, Refusal
from redisflow.topology import Address, Part, Topology

A, B, C = ("10.0.0.1", 7000), ("10.0.0.2", 7000), ("10.0.0.3", 7001)
SEED = ("seed", 7000)


def node(address: Address) -> list[Any]:
    """A node as CLUSTER SLOTS tells of it."""
    return [address[0].encode(), address[1], b"id", []]


def topology(**options: Any) -> Topology:
    """A, with a replica, has the lower half; B the upper but for its last slot, which nobody has."""
    known = Topology([SEED], options.get("remap"))
    known.take([[0, 8191, node(A), node(C)], [8192, 16382, node(B)]], SEED)
    return known


def moved(slot: int, where: str, code: str = "MOVED") -> Refusal:
    """A refusal that names another node."""
    return Refusal(code, f"{code} {slot} {where}")


def parts(known: Topology, slots: list[int | None], *redirects: Refusal | None) -> list[Part]:
    """How a packet is parted."""
    return list(known.parts(slots, Again((), redirects) if redirects else None))


def test_a_packet_is_parted_by_owner_in_its_order() -> None:
    """One part for each node; what nobody has is in none."""
    assert parts(topology(), [0, 9000, 8191, 16383, 8192]) == [Part(A, [0, 2], False, 1), Part(B, [1, 4], False)]


def test_any_node_that_takes_changes_will_do_for_no_slot() -> None:
    """Never a replica; all such commands of a packet go to the same one."""
    seen = {parts(topology(), [None, None])[0].address for _ in range(100)}
    assert seen == {A, B}
    assert all(len(parts(topology(), [None, None])) == 1 for _ in range(20))


def test_a_moved_slot_stays_moved() -> None:
    """That slot alone."""
    known = topology()
    known.learn(Again((), [moved(5, "10.0.0.9:7005"), None]))
    assert known.owner(5) == ("10.0.0.9", 7005)
    assert known.owner(4) == known.owner(6) == A


def test_an_ask_is_for_that_command_alone() -> None:
    """It goes to the node named, after ASKING; the slot stays where it is."""
    known = topology()
    again = [moved(5, "10.0.0.9:7005", "ASK"), None]
    known.learn(Again((), again))
    assert parts(known, [5, 5], *again) == [Part(("10.0.0.9", 7005), [0], True), Part(A, [1], False, 1)]
    assert known.owner(5) == A


@pytest.mark.parametrize("host", [b"", None, b"?"])
def test_a_node_without_a_host_is_where_it_was_told_of(host: bytes | None) -> None:
    """As behind an address the nodes do not know."""
    known = Topology([SEED], None)
    known.take([[0, 16383, [host, 7009, b"id"]]], ("public", 7000))
    assert known.owner(0) == ("public", 7009)
    known.learn(Again((), [moved(3, ":7010")]))
    assert known.owner(3) == ("public", 7010)


def test_an_ipv6_address_is_read() -> None:
    """The port is behind the last colon."""
    known = topology()
    known.learn(Again((), [moved(3, "::1:7010")]))
    assert known.owner(3) == ("::1", 7010)


def test_addresses_are_mapped_as_the_client_wants() -> None:
    """Those in CLUSTER SLOTS and those in refusals."""
    known = topology(remap=lambda address: ("localhost", address[1] + 1))
    assert known.owner(0) == ("localhost", 7001)
    known.learn(Again((), [moved(3, "10.0.0.9:7010")]))
    assert known.owner(3) == ("localhost", 7011)


def test_each_primary_has_a_slot_to_be_addressed_by() -> None:
    """Replicas and nodes without slots have none."""
    known = topology()
    assert [known.owner(slot) for slot in known.primaries()] == [A, B]
    assert set(known.nodes()) == {A, B, C}


def test_who_did_not_answer_lately_is_asked_last() -> None:
    """Every node, then the seeds, but for those."""
    asked = topology().informants(Again({"10.0.0.2:7000"}, [None]))
    assert sorted(asked) == sorted([A, B, C, SEED])
    assert asked[-1] == B
    assert topology().informants(None)[-1] == SEED


def test_replies_are_put_where_they_belong() -> None:
    """Those to ASKING are dropped; a loss stands for each command of the part."""
    packet = Packet([5, 9000, 6], [(b"a",), (b"b",), (b"c",)], 1.0, confirm=Confirm(1, 1.0, [b"k1", b"k2", b"k3"]))
    replies: list[Any] = [None] * 3
    part = Part(A, [0, 2], asking=True, replicas=2)
    sent = part.packet(packet)
    assert list(sent.commands) == [(b"ASKING",), (b"a",), (b"ASKING",), (b"c",)]
    assert len(sent.slots) == 4
    assert sent.confirm is not None
    assert (sent.confirm.flow_keys, sent.confirm.asking, sent.confirm.at_least) == ([b"k1", b"k3"], True, 2)
    part.place([b"OK", 1, b"OK", 3], replies)
    lost = Lost("gone", sent=True)
    Part(B, [1], asking=False).lose(lost, replies)
    assert replies == [1, lost, 3]
