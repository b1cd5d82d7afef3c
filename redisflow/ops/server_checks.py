"""What a health check asks of the server and of the namespace: whether what is stored stays stored."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import attrs

from redisflow.calls import Primaries, Read, command
from redisflow.diagnosis import Finding, Severity
from redisflow.errors import FlowError
from redisflow.keys import LAYOUT_VERSION, meta_key, slot_of
from redisflow.ops.findings import Findings, readable
from redisflow.ops.namespace import Namespace
from redisflow.ops.upkeep import product_of, read_info

_LAST_ERRORS = {
    "aof_last_write_status": (Severity.ERROR, "the last write to the append-only file failed"),
    "rdb_last_bgsave_status": (Severity.ERROR, "the last snapshot failed"),
    "aof_last_bgrewrite_status": (Severity.WARNING, "the last rewrite of the append-only file failed"),
}

_CUTS_RIGHT = (9, 1, 2)  # valkey-io/valkey#4342; Redis 7.0.15 does not, and of no other is it known


def examine_server(namespace: Namespace, findings: Findings) -> Generator[Read | Primaries, Any, None]:
    """Look at the settings and the state of each server, and at the namespace's settings."""
    primaries = yield Primaries()
    for primary in primaries:
        yield from _examine_one(primary, findings, several=len(primaries) > 1)
    meta = meta_key(namespace.prefix)
    (meta_reply,) = yield Read(
        [command(slot_of(meta), b"HMGET", meta.encode(), b"layout", b"partitions")], tolerant=True
    )
    findings.add(_layout(namespace, meta.encode(), meta_reply))


def _examine_one(slot: int | None, findings: Findings, *, several: bool) -> Generator[Read, Any, None]:
    info_reply, config_reply = yield Read(
        [
            command(slot, b"INFO"),
            command(slot, b"CONFIG", b"GET", b"save", b"min-replicas-to-write", b"aof-load-truncated"),
        ],
        tolerant=True,
    )
    if isinstance(info_reply, FlowError):
        findings.unavailable("version, eviction, persistence and replication", "INFO", info_reply)
        return
    info = read_info(info_reply)
    config: Mapping[str, str] | None = None
    if isinstance(config_reply, FlowError):
        findings.unavailable("snapshots, min-replicas-to-write and aof-load-truncated", "CONFIG GET", config_reply)
    else:
        names, values = config_reply[::2], config_reply[1::2]
        config = {readable(name): readable(value) for name, value in zip(names, values, strict=True)}
    found = [Finding(Severity.OK, "server", " ".join(product_of(info))), _eviction(info)]
    for finding in (*found, *_persistence(info, config), *_replication(info, config)):
        # The port alone would not do: nodes on several machines have the same one.
        what = f"node with slot {slot}, port {info.get('tcp_port')}: {finding.what}" if several else finding.what
        findings.add(attrs.evolve(finding, what=what))


def _eviction(info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    limit = "no memory limit" if info.get("maxmemory", "0") == "0" else f"at most {info.get('maxmemory_human')}"
    severity, advice = Severity.OK, ""
    if policy.startswith("allkeys-"):
        severity, advice = Severity.ERROR, "set it to noeviction: the server deletes flows when memory runs short"
    elif policy != "noeviction":
        severity = Severity.INFO
        advice = "noeviction is best: a full server then still lets you end and delete flows"
    return Finding(severity, "eviction", f"maxmemory-policy {policy}, {limit}", advice=advice)


def _persistence(info: Mapping[str, str], config: Mapping[str, str] | None) -> Iterator[Finding]:
    snapshots = None if config is None else config.get("save", "")
    if info.get("aof_enabled") == "1":
        what = "append-only file" + (f", snapshots {snapshots}" if snapshots else "")
        yield Finding(Severity.OK, "persistence", what)
        if (config or {}).get("aof-load-truncated") == "yes" and not _cuts_right(info):
            yield Finding(
                Severity.INFO,
                "persistence",
                "of an append-only file torn in a crash, this version keeps half a change and applies it later",
                advice="where the log of a start says `Truncating the AOF`, send BGREWRITEAOF",
            )
    elif snapshots == "":
        yield Finding(
            Severity.WARNING,
            "persistence",
            "no append-only file, no snapshots: a restart loses every flow",
            advice="set appendonly yes",
        )
    else:
        which = "no snapshots that can be told of" if snapshots is None else f"snapshots {snapshots}"
        yield Finding(
            Severity.INFO,
            "persistence",
            f"no append-only file, {which}",
            advice="set appendonly yes: a crash loses what came behind the last snapshot",
        )
    for field, (severity, what) in _LAST_ERRORS.items():
        if info.get(field, "ok") != "ok":
            yield Finding(
                severity,
                "persistence",
                what,
                advice="read the server's log; look for a full disk: until it is mended, changes may be refused",
            )


def _cuts_right(info: Mapping[str, str]) -> bool:
    """Whether a torn append-only file is cut off before the transaction it is torn in."""
    product, version = product_of(info)
    return product == "Valkey" and tuple(int(part) for part in version.split(".") if part.isdigit()) >= _CUTS_RIGHT


def _replication(info: Mapping[str, str], config: Mapping[str, str] | None) -> Iterator[Finding]:
    if info.get("role") == "slave":
        link = info.get("master_link_status", "down")
        yield Finding(
            Severity.WARNING if link == "up" else Severity.ERROR,
            "replication",
            f"a replica, its link to the primary {link}: it refuses changes, and its data may be old",
            advice="connect to the primary",
        )
        return
    count = int(info.get("connected_slaves", "0"))
    wanted = int((config or {}).get("min-replicas-to-write", "0"))
    replicas = "no replicas" if count == 0 else f"{count} replica{'' if count == 1 else 's'}"
    least = f", min-replicas-to-write {wanted}" if wanted else ""
    yield Finding(Severity.OK, "replication", f"primary, {replicas}{least}")
    if (good := int(info.get("min_slaves_good_slaves", wanted))) < wanted:
        yield Finding(
            Severity.ERROR,
            "replication",
            f"{good} of {wanted} replicas that it must have to accept changes",
            advice="bring replicas back, or lower min-replicas-to-write",
        )
    for number in range(count):
        fields = dict(part.partition("=")[::2] for part in info.get(f"slave{number}", "").split(","))
        if fields.get("state", "online") != "online":
            yield Finding(
                Severity.WARNING,
                "replication",
                f"the replica {fields.get('ip')}:{fields.get('port')} is not online: {fields['state']}",
                advice="wait until it is in sync; if that takes long, read its log",
            )


def _layout(namespace: Namespace, meta: bytes, reply: Any) -> Finding:
    wanted = (LAYOUT_VERSION, len(namespace.keyspace.partitions))
    found = (None, None) if isinstance(reply, FlowError) else tuple(None if r is None else readable(r) for r in reply)
    if found == tuple(map(str, wanted)):
        return Finding(Severity.OK, "layout", "version {}, {} partitions".format(*wanted))
    return Finding(
        Severity.ERROR,
        "layout",
        "version {} and {} partitions are what is stored; this client uses {} and {}".format(*found, *wanted),
        key=readable(meta),
        advice="HSET {} layout {} partitions {}, before anybody connects: he would look for flows elsewhere".format(
            readable(meta), *wanted
        ),
    )
