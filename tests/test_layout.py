"""The scripts' form, the key names, and where partitions land: what luacheck and a server would not tell."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import attrs
import pytest
from redis.crc import key_slot

from redisflow import FlowStatus
from redisflow.keys import DEFAULT_PARTITIONS, MAX_PARTITIONS, SLOTS, Keyspace, Partition, meta_key
from redisflow.scripts import Script
from tests.support.lua import EVERY_SCRIPT, LUA

PAGE = LUA.parent / "docs" / "layout.md"
SCRIPTS = sorted(LUA.glob("*.lua"))
INCLUDES = sorted(LUA.glob("include/*.lua"))
INCLUDE_LINE = re.compile(r"^ *--- include: (\S+)$", re.MULTILINE)


def name_of(path: Path) -> str:
    """The file's name, as the test's id."""
    return path.stem


def code_of(text: str) -> str:
    """A script without its comments."""
    return re.sub(r"--.*", "", text)


def head_of(path: Path) -> str:
    """A script up to its first empty line: the header, and the names its keys and arguments get."""
    return path.read_text(encoding="utf-8").partition("\n\n")[0]


# --- scripts -------------------------------------------------------------------------------------------


def test_there_are_scripts() -> None:
    """What follows looks at something."""
    assert {path.stem for path in SCRIPTS} == {script.name for script in EVERY_SCRIPT}
    assert INCLUDES


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_keys_and_arguments_are_bound_to_names_in_the_head(path: Path) -> None:
    """Nothing but `local` before the first empty line; behind it no `KEYS`, and of `ARGV` just the rest of it."""
    head = code_of(head_of(path)).split("\n")
    assert [line for line in head if line and not line.startswith("local ")] == []
    body = code_of(path.read_text(encoding="utf-8").partition("\n\n")[2])
    assert re.findall(r"\bKEYS\b.*|ARGV *\[.*", body) == []
    assert re.sub(r"unpack\(ARGV,|#ARGV\b", "", body).count("ARGV") == 0


@pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda script: script.name)
def test_no_key_is_named_by_number_behind_the_first_guard(script: Script) -> None:
    """As sent, with the verb's prelude and the includes: what is numbered comes before what is done."""
    code = code_of(script.plain.text.decode())
    first_guard = re.search(r"\bif\b|\bcall\(|\bfunction\b", code)
    last_number = max(match.start() for match in re.finditer(r"\bKEYS\b|ARGV *\[", code))
    assert first_guard is not None
    assert last_number < first_guard.start()


def documented(header: str, part: str, until: str) -> dict[int, str]:
    """What the header says of `KEYS` or `ARGV`: each one's number and the first word of its name."""
    text = header.partition(f"\n-- {part}")[2].partition(f"\n-- {until}")[0]
    return {int(number): name for number, name in re.findall(r"(?:^|\n--)? {2,}(\d+)(?:-\d+)? +(\w+)", text)}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_says_what_it_takes_and_what_it_answers(path: Path) -> None:
    """One sentence, then KEYS, ARGV and REPLY in this order."""
    head = head_of(path)
    assert re.match(r"-- [A-Z].*\.\n", head)
    assert re.findall(r"^-- (KEYS|ARGV|REPLY) +\S", head, re.MULTILINE) == ["KEYS", "ARGV", "REPLY"]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_the_header_has_the_names_the_script_uses(path: Path) -> None:
    """Each argument under its number, each key under its own with `_key` behind."""
    head = head_of(path)
    keys, args = documented(head, "KEYS", "ARGV"), documented(head, "ARGV", "REPLY")
    code = code_of(head)
    for kind, names in (("KEYS", {n: f"{name}_key" for n, name in keys.items()}), ("ARGV", args)):
        bound = dict(bindings(code, kind))
        assert bound
        assert {n: names.get(n) for n in bound} == bound
    assert sorted(args) == list(range(1, len(args) + 1))
    assert (args[1], args[2]) == FIRST_ARGUMENTS.get(path.stem, ("op", "conditions"))


# Of the scripts that carry out no operation.
FIRST_ARGUMENTS = {"read_own": ("owner", "name"), "settle": ("owner", "carried"), "reconcile": ("flow_id", "wait")}


def bindings(code: str, kind: str) -> Iterator[tuple[int, str]]:
    """The numbers of `KEYS` or `ARGV` that a head binds to names, and the names."""
    for names, values in re.findall(r"^local ([\w, ]+) = (.+)$", code, re.MULTILINE):
        if unpacked := re.fullmatch(rf"unpack\({kind}, (\d+), (\d+)\)", values):
            yield from zip(range(int(unpacked[1]), int(unpacked[2]) + 1), names.split(", "), strict=True)
        elif numbers := re.findall(rf"{kind}\[(\d+)\]", values):
            yield from zip(map(int, numbers), names.split(", "), strict=True)


@pytest.mark.parametrize("path", INCLUDES, ids=name_of)
def test_an_include_is_used_and_only_defines(path: Path) -> None:
    """It says what it is for, is pasted into some file, and touches no key or argument of the script around it."""
    text = path.read_text(encoding="utf-8")
    assert re.match(r"-- [A-Z].*\.\n", text)
    assert any(path.name in INCLUDE_LINE.findall(user.read_text(encoding="utf-8")) for user in SCRIPTS + INCLUDES)
    assert re.findall(r"\bKEYS\b|\bARGV\b", code_of(text)) == []
    outermost = re.findall(r"^\S+(?: \S+)?", code_of(text), re.MULTILINE)
    assert {line for line in outermost if not line.startswith("local ")} == {"end"}


@pytest.mark.parametrize("path", SCRIPTS + INCLUDES, ids=name_of)
def test_what_is_included_exists(path: Path) -> None:
    """Under that name, in lua/include."""
    used = INCLUDE_LINE.findall(path.read_text(encoding="utf-8"))
    assert set(used) <= {include.name for include in INCLUDES}


# --- key names -----------------------------------------------------------------------------------------

FLOW_ID = UUID("6f9619ff-8b86-4d01-b42d-00c04fc964f3")
OWNERS = [
    "agent:kate",
    "{}",
    "{other}",
    "{redisflow:0.1}",
    "}{",
    "}:flow:x",
    "{",
    "}",
    "*",
    " ",
    "\0",
    "a\r\nb",
    "éü漢🦊",
    "x" * 1024,
]


def keys_of(partition: Partition, owner: str) -> list[bytes]:
    """Every key name a partition gives."""
    flow_id = str(FLOW_ID).encode()
    return [
        partition.flow(flow_id),
        partition.events(flow_id),
        partition.steps(flow_id),
        partition.seen(flow_id),
        partition.owner(owner.encode()),
        *(partition.status(status) for status in FlowStatus),
        partition.due,
        partition.waiters,
        partition.scratch,
    ]


def kinds_of(partition: Partition) -> set[str]:
    """Every kind of key a partition has a name for."""
    held = attrs.asdict(partition, recurse=False).values()
    names = [name for value in held for name in (value.values() if isinstance(value, dict) else [value])]
    return {name.decode().partition("}:")[2].partition(":")[0] for name in names if isinstance(name, bytes)}


def test_every_kind_of_key_is_documented() -> None:
    """The table of docs/layout.md has each, no other, and the key that describes the namespace."""
    page = PAGE.read_text(encoding="utf-8")
    partition = Keyspace.of("redisflow", 1).partitions[0]
    rows = re.findall(r"^\| `\{tag\}:(\w+)(?::<\w+>)?` \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == kinds_of(partition)
    assert {key.decode().partition("}:")[2].partition(":")[0] for key in keys_of(partition, "o")} == kinds_of(partition)
    assert meta_key("redisflow") in page


@pytest.mark.parametrize("owner", OWNERS, ids=ascii)
def test_every_key_of_a_partition_is_in_its_slot(owner: str) -> None:
    """As redis-py counts slots, whatever an owner is called; and all keys are different."""
    for partition in Keyspace.of("redisflow", DEFAULT_PARTITIONS).partitions:
        keys = keys_of(partition, owner)
        assert {key_slot(key) for key in keys} == {partition.slot}
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("owner", OWNERS, ids=ascii)
def test_a_key_can_be_taken_apart(owner: str) -> None:
    """Into its partition, kind and name, whatever an owner is called."""
    keyspace = Keyspace.of("redisflow", DEFAULT_PARTITIONS)
    member, home = str(FLOW_ID).encode(), keyspace.partition_of(FLOW_ID)
    taken = [keyspace.parse(key) for key in keys_of(home, owner)]
    assert taken == [
        (home, home.flow(member), "flow", member),
        (home, home.events(member), "events", member),
        (home, home.steps(member), "steps", member),
        (home, home.seen(member), "seen", member),
        (home, home.owner(owner.encode()), "owner", owner.encode()),
        *((home, home.status(status), "status", status.encode()) for status in FlowStatus),
        (home, home.due, "due", b""),
        (home, home.waiters, "waiters", b""),
        (home, home.scratch, "scratch", b""),
    ]
    for other in set(keyspace.partitions) - {home}:
        assert [keyspace.parse(key) is None for key in keys_of(other, owner)] == [True] * 4 + [False] * 10


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"{",
        b"redisflow:meta",
        b"{redisflow:3.11}",
        b"{redisflow:3.11}:",
        b"{redisflow:3.11}:flow",
        b"{x:3.11}:due",
    ],
)
def test_what_is_no_key_of_the_layout_is_told(key: bytes) -> None:
    """As are those of tests/test_doctor.py."""
    assert Keyspace.of("redisflow", DEFAULT_PARTITIONS).parse(key) is None


@pytest.mark.parametrize("prefix", ["a", "A.b-c_9", ".", "x" * 64])
@pytest.mark.parametrize("partitions", [1, 2, 3, 7, DEFAULT_PARTITIONS, MAX_PARTITIONS])
def test_each_partition_has_a_slot_in_its_share(prefix: str, partitions: int) -> None:
    """The p-th of P is in the p-th P-th of the slots, under any prefix, and redis-py finds it there."""
    for number, partition in enumerate(Keyspace.of(prefix, partitions).partitions):
        assert partition.number == number
        assert key_slot(partition.due) == partition.slot
        assert number * SLOTS <= partition.slot * partitions < (number + 1) * SLOTS


def flow_partitions_by_master(keyspace: Keyspace, masters: int) -> list[int]:
    """How many partitions each master of an evenly split cluster gets; ranges as `redis-cli --cluster create` cuts."""
    firsts = [round(n * SLOTS / masters) for n in range(1, masters)]
    found = Counter(bisect_right(firsts, partition.slot) for partition in keyspace.partitions)
    return [found[master] for master in range(masters)]


@pytest.mark.parametrize("masters", [1, 3, 6, 16])
def test_partitions_spread_evenly_over_masters(masters: int) -> None:
    """The namespace everyone gets who chooses nothing: no master has more than one partition more than another."""
    shares = flow_partitions_by_master(Keyspace.of("redisflow", DEFAULT_PARTITIONS), masters)
    assert sum(shares) == DEFAULT_PARTITIONS
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("masters", range(1, DEFAULT_PARTITIONS + 1))
def test_no_prefix_spreads_badly(masters: int) -> None:
    """Whole shares stay with their master, and of those cut by a border each goes to one side or the other."""
    for prefix in (f"p{n}" for n in range(50)):
        shares = flow_partitions_by_master(Keyspace.of(prefix, DEFAULT_PARTITIONS), masters)
        if DEFAULT_PARTITIONS % masters == 0:
            assert set(shares) == {DEFAULT_PARTITIONS // masters}
        assert all(abs(share - DEFAULT_PARTITIONS / masters) < 2 for share in shares)
