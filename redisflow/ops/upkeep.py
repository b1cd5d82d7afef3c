"""Connecting to a namespace, deleting and pruning flows."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from redisflow import scripts
from redisflow.calls import NO_COPY, Batch, Call, Command, Primaries, Read, Reply, command
from redisflow.errors import (
    FlowError,
    FlowFailure,
    InvalidData,
    LayoutMismatch,
    PartialFailure,
    StorageError,
)
from redisflow.flow import TERMINAL, FlowRef, FlowStatus
from redisflow.keys import DEFAULT_PARTITIONS, LAYOUT_VERSION, MAX_PARTITIONS, Partition, meta_key, slot_of
from redisflow.ops.namespace import (
    Namespace,
    Target,
    expectation,
    if_own,
    is_drawn,
    log,
    op_id_of,
    partition_of,
    raise_refusal,
    span_us,
    target_of,
)
from redisflow.ops.reads import Listing
from redisflow.scripts import barred
from redisflow.waits import from_us

MIN_REDIS, MIN_VALKEY = (7, 0), (7, 2)
PRUNE_PAGE = 500


# --- connecting ----------------------------------------------------------------------------------------


def connect(
    namespace: Namespace, *, real_server: bool, allow_eviction: bool, confirms: bool = False
) -> Generator[Read | Primaries, Any, None]:
    """Check the server and join the namespace, creating it where it is new.

    Args:
        namespace: which.
        real_server: false for fakeredis, which has little to check.
        allow_eviction: accept a server that may evict flows.
        confirms: whether changes wait for replicas, which takes permissions of its own.

    Raises:
        StorageError: the server is too old, may evict flows, or cannot be reached.
        LayoutMismatch: the namespace was created with another layout; nothing was written.
    """
    cluster = False
    if real_server:
        for primary in (yield Primaries()):
            cluster = primary is not None
            yield from _check_server(primary, allow_eviction=allow_eviction)
    meta = meta_key(namespace.prefix).encode()
    slot = slot_of(meta_key(namespace.prefix))
    fields = command(slot, b"HMGET", meta, b"layout", b"partitions")
    ((layout, partitions),) = yield Read([fields])
    if partitions is not None:
        _require_partitions(namespace, _number(namespace, partitions))
    if layout is None:
        # Perhaps there is half a namespace, of a creator that was cut short: it is completed.
        wanted = DEFAULT_PARTITIONS if namespace.partitions is None else namespace.partitions
        # Whoever sets a field first decides it: two creators of one namespace end with the same settings.
        _, _, (layout, partitions) = yield Read(
            [
                command(slot, b"HSETNX", meta, b"partitions", wanted),
                command(slot, b"HSETNX", meta, b"layout", LAYOUT_VERSION),
                fields,
            ]
        )
    found_layout, found_partitions = _number(namespace, layout), _number(namespace, partitions)
    if found_layout != LAYOUT_VERSION:
        raise LayoutMismatch(namespace.prefix, "layout version", LAYOUT_VERSION, found_layout)
    _require_partitions(namespace, found_partitions)
    namespace.connected(found_partitions)
    if real_server:
        yield from _check_permissions(namespace.keyspace.partitions[0], slot, meta, cluster=cluster)
        if confirms:
            yield from check_confirming(namespace)


def _require_partitions(namespace: Namespace, found: int) -> None:
    if namespace.partitions not in {None, found}:
        raise LayoutMismatch(namespace.prefix, "partition count", namespace.partitions or 0, found)


def _check_permissions(
    partition: Partition, meta_slot: int, meta: bytes, *, cluster: bool
) -> Generator[Read, Any, None]:
    """Check that this user may do what the scripts do: refused midway, a script keeps what it wrote before.

    Raises:
        StorageError: a permission is missing; names the command.
    """
    member = b"permissions"  # no UUID, so no flow's id
    flow, events, steps = partition.flow(member), partition.events(member), partition.steps(member)
    index = partition.owner(member)
    # Each changes nothing: on keys that do not exist, or, for two, by writing what is there already.
    replies = yield Read(
        [
            command(partition, b"COPY", events, steps, b"REPLACE"),
            command(partition, b"RENAME", steps, events),
            command(partition, b"PEXPIRE", flow, 1),
            command(partition, b"PERSIST", flow),
            command(partition, b"PTTL", flow),
            command(partition, b"XINFO", b"STREAM", events),
            *(command(partition, name, flow) for name in (b"EXISTS", b"HGETALL", b"HKEYS", b"HLEN")),
            command(partition, b"HMGET", flow, b"status"),
            command(partition, b"HGET", flow, b"status"),
            command(partition, b"HEXISTS", flow, b"s"),
            command(partition, b"HDEL", flow, b"s"),
            command(meta_slot, b"HSET", meta, b"layout", LAYOUT_VERSION),
            command(meta_slot, b"HINCRBY", meta, b"layout", 0),
            command(partition, b"HVALS", steps),
            command(partition, b"UNLINK", flow, events, steps),
            command(partition, b"XADD", events, b"NOMKSTREAM", b"*", b"rev", b"0"),
            command(partition, b"XLEN", events),
            command(partition, b"XRANGE", events, b"-", b"+", b"COUNT", 1),
            command(partition, b"XREVRANGE", events, b"+", b"-", b"COUNT", 1),
            command(partition, b"XREAD", b"COUNT", 1, b"STREAMS", events, b"0-0"),
            command(partition, b"ZADD", index, b"XX", 0, member),
            command(partition, b"ZCARD", index),
            command(partition, b"ZINTER", 2, index, index),
            command(partition, b"ZINTERCARD", 2, index, index),
            command(partition, b"ZRANGE", index, 0, 0),
            command(partition, b"ZREM", index, member),
            command(partition, b"ZSCORE", index, member),
            *([command(partition, b"ASKING")] if cluster else []),  # holds for one command, and to no effect
            command(partition, b"EVAL", b"#!lua flags=no-writes,allow-oom\nreturn redis.call('TIME')", 1, flow),
        ],
        tolerant=True,
        insist=False,
    )
    _require_permitted(replies)


def check_confirming(namespace: Namespace) -> Generator[Read, Any, None]:
    """Check that this user may wait for replicas: refused behind a change, the change would have been made.

    Raises:
        StorageError: a permission is missing; names the command.
    """
    partition = namespace.keyspace.partitions[0]
    wait, role = command(partition, b"WAIT", 0, 1), command(partition, b"ROLE")
    _require_permitted((yield Read([wait, role], tolerant=True, insist=False)))


def _require_permitted(replies: Iterable[Reply | FlowError]) -> None:
    for reply in replies:
        if isinstance(reply, StorageError) and reply.code == "NOPERM":
            raise reply


def _number(namespace: Namespace, text: bytes | None) -> int:
    if (
        text is None
        or not text.isdigit()
        or len(text) > len(str(MAX_PARTITIONS))
        or not 1 <= int(text) <= MAX_PARTITIONS
    ):
        raise InvalidData(f"namespace {namespace.prefix!r}: {meta_key(namespace.prefix)} is damaged")
    return int(text)


def _check_server(slot: int | None, *, allow_eviction: bool) -> Generator[Read, Any, None]:
    """Check the version of the node that has a slot, and that what is stored there stays stored."""
    info_reply, save_reply = yield Read(
        [command(slot, b"INFO"), command(slot, b"CONFIG", b"GET", b"save")], tolerant=True
    )
    if isinstance(info_reply, FlowError):
        raise info_reply
    info = read_info(info_reply)
    _check_version(info)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys-") and not allow_eviction:
        raise StorageError(
            f"the server's maxmemory-policy is {policy}: it deletes flows when memory runs short. "
            "Set it to noeviction, or pass allow_eviction=True to accept losing them"
        )
    # Some hosts forbid CONFIG; then there is no telling, and nothing is said.
    snapshots = isinstance(save_reply, FlowError) or (len(save_reply) > 1 and bool(save_reply[1]))
    if info.get("aof_enabled") == "0" and not snapshots:
        warnings.warn(
            "the server keeps nothing on disk (no append-only file, no snapshots): a restart loses every flow",
            RuntimeWarning,
            stacklevel=2,
        )


def read_info(reply: bytes) -> dict[str, str]:
    """The fields of INFO."""
    return dict(line.split(":", 1) for line in reply.decode(errors="replace").splitlines() if ":" in line)


def product_of(info: Mapping[str, str]) -> tuple[str, str]:
    """The server's product and version. A Valkey has a `redis_version` too."""
    if "valkey_version" in info:
        return "Valkey", info["valkey_version"]
    return "Redis", info.get("redis_version", "0")


def _check_version(info: dict[str, str]) -> None:
    name, version = product_of(info)
    needed = MIN_VALKEY if name == "Valkey" else MIN_REDIS
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < needed:
        wanted = ".".join(map(str, needed))
        raise StorageError(f"the server is {name} {version}; redisflow needs {name} {wanted} or newer")


# --- deleting ------------------------------------------------------------------------------------------


def delete(
    namespace: Namespace, flow: FlowRef, *, expected_revision: object, op_id: object
) -> Generator[Any, Any, bool]:
    """Delete a flow, live or not, with every key of its. Returns whether there was one."""
    target = target_of(flow)
    op = op_id_of(op_id)
    expected = expectation(target, expected_revision)
    while True:
        (found,) = yield Read([_owner_of(namespace, target)])
        # Even of a flow that is gone the script is asked: this deletion may have been made before.
        reply = yield _delete_call(namespace, target, found, op, expected=expected, op_id=op_id)
        match reply:
            case [b"OK"]:
                return True
            case [b"ABSENT"]:
                return False
            case [b"MOVED"]:  # deleted and created anew since the read
                continue
        raise_refusal(reply, target.flow_id, op, expected=expected)


def prune_terminal_flows(namespace: Namespace, older_than: timedelta) -> Generator[Any, Any, int]:
    """Delete terminal flows that have not changed for that long. Returns how many."""
    older_than_us = span_us("older_than", older_than)
    ((seconds, micros),) = yield Read([command(None, b"TIME")])
    before_us = int(seconds) * 1_000_000 + int(micros) - older_than_us
    if before_us <= 0:
        return 0
    pruned = 0
    for status in TERMINAL:
        listing = Listing.of_status(namespace, status, from_us(before_us), PRUNE_PAGE)
        while (targets := (yield from listing.next_targets())) is not None:
            count, failed = yield from _prune_page(namespace, targets, before_us)
            pruned += count
            if failed:
                raise PartialFailure(failed, count=pruned)
    return pruned


def _prune_page(
    namespace: Namespace, targets: list[Target], before_us: int
) -> Generator[Any, Any, tuple[int, list[FlowFailure]]]:
    """Delete a page of flows. Returns how many there were, and those that failed."""
    owners = yield Read([_owner_of(namespace, target) for target in targets], tolerant=True)
    calls = [
        _delete_call(namespace, target, found, op_id_of(None), prune_before_us=before_us)
        for target, found in zip(targets, owners, strict=True)
        if not isinstance(found, FlowError) and None not in found[:2]  # neither gone nor damaged
    ]
    if not calls:
        return 0, []
    outcomes = yield Batch(calls)
    failed: list[FlowFailure] = []
    for place, (call, outcome) in enumerate(zip(calls, outcomes, strict=True)):
        if isinstance(outcome, InvalidData):
            log.warning("not pruned: %s", outcome)
        elif isinstance(outcome, FlowError):
            failed.append(FlowFailure(place, call.flow_id, outcome))
    return sum(outcome == [b"OK"] for outcome in outcomes), failed


def _owner_of(namespace: Namespace, target: Target) -> Command:
    partition = partition_of(namespace, target)
    fields = command(partition, b"HMGET", partition.flow(target.member), b"owner_session_key", b"created_at", b"etag")
    return if_own(namespace, target, fields)


def _delete_call(
    namespace: Namespace,
    target: Target,
    found: Sequence[bytes | None],
    op: str,
    *,
    expected: bytes = b"",
    op_id: object = None,
    prune_before_us: int | None = None,
) -> Call:
    partition, member = partition_of(namespace, target), target.member
    owner, created_at, etag = found
    pruning = (b"", b"") if prune_before_us is None else (barred(TERMINAL).encode(), b"%d" % prune_before_us)
    return Call(
        scripts.DELETE,
        partition.slot,
        (
            partition.flow(member),
            partition.events(member),
            partition.steps(member),
            partition.seen(member),
            partition.owner(owner or b""),
            partition.due,
            partition.waiters,
            *(partition.status(status) for status in FlowStatus),
            *(() if op_id is None else (partition.seen(member),)),
        ),
        (member, created_at or b"", *pruning),
        target.flow_id,
        op,
        expected=expected,
        owner=namespace.owner,
        copy=NO_COPY if etag is None else {b"etag": etag},
        brought=op_id is not None,
        doubtful=op_id is not None and is_drawn(op),
        seen=partition.seen(member),
        in_trail=False,
        if_deleted=None,
    )
