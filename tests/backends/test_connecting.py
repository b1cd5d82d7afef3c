"""What is checked when connecting: the server's version, its settings, the namespace."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from redisflow import InvalidData, LayoutMismatch, StepObservation, StorageError
from redisflow.calls import Command
from redisflow.ops import upkeep
from redisflow.ops.namespace import Namespace
from tests.support.servers import ENGINES, Server
from tests.support.subjects import Subject, create, works

if TYPE_CHECKING:
    from redis.typing import EncodableT, FieldT


def checked(info: str, save: list[bytes] | StorageError, *, allow_eviction: bool = False) -> Sequence[Command]:
    """Drive the connection's check by hand: give it what INFO and CONFIG GET save say; return how it goes on."""
    op: Any = upkeep.connect(Namespace("p"), real_server=True, allow_eviction=allow_eviction)
    next(op)
    op.send((None,))
    commands: Sequence[Command] = op.send([info.replace("\n", "\r\n").encode(), save]).commands
    return commands


GOOD = "# Server\nredis_version:7.4.0\naof_enabled:1\nmaxmemory_policy:noeviction\n"
VALKEY = "redis_version:7.2.4\nvalkey_version:8.1.0\naof_enabled:1\nmaxmemory_policy:noeviction\n"


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (GOOD.replace("7.4.0", "6.2.14"), r"Redis 6\.2\.14.*7\.0"),
        (GOOD.replace("7.4.0", "5.0.7"), r"Redis 5\.0\.7"),
        (VALKEY.replace("8.1.0", "7.0.1"), r"Valkey 7\.0\.1.*7\.2"),
    ],
)
def test_an_old_server_is_refused(info: str, said: str) -> None:
    """Below Redis 7.0, Valkey 7.2: StorageError says which it is and which is needed."""
    with pytest.raises(StorageError, match=said):
        checked(info, [b"save", b"3600 1"])


@pytest.mark.parametrize("info", [GOOD, GOOD.replace("7.4.0", "7.0.0"), GOOD.replace("7.4.0", "10.0.1"), VALKEY])
def test_a_new_enough_server_is_accepted(info: str) -> None:
    """The bounds belong to what is accepted; versions are numbers, not text."""
    assert checked(info, [b"save", b""])


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_an_evicting_server_is_refused(policy: str) -> None:
    """Unless the caller accepts it; `volatile-*` evicts nothing of ours."""
    info = GOOD.replace("noeviction", policy)
    with pytest.raises(StorageError, match=f"{policy}.*allow_eviction"):
        checked(info, [b"save", b""])
    assert checked(info, [b"save", b""], allow_eviction=True)
    assert checked(info.replace("allkeys", "volatile"), [b"save", b""])


def test_where_config_is_forbidden_nothing_is_said() -> None:
    """Hosts that refuse CONFIG are no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = StorageError("this user has no permissions to run CONFIG", "NOPERM")
        assert checked(GOOD.replace("aof_enabled:1", "aof_enabled:0"), refused)


def test_a_real_evicting_server_is_refused(prefix: str, from_url: Any) -> None:
    """As configured, over the wire; nothing is written."""
    with Server(ENGINES[0], "--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb") as server:
        with pytest.raises(StorageError, match="allkeys-lru"):
            from_url(server.url, prefix=prefix).connect()
        assert server.client().dbsize() == 0
        works(from_url(server.url, prefix=prefix, allow_eviction=True))


def test_a_server_that_keeps_nothing_is_warned_about_once(prefix: str, from_url: Any) -> None:
    """No append-only file and no snapshots: one warning, at connect."""
    with Server(ENGINES[0], persistence=False) as server:
        flows = from_url(server.url, prefix=prefix)
        with pytest.warns(RuntimeWarning, match="disk") as warned:
            flows.connect()
        assert len(warned) == 1
        works(flows)  # further warnings are errors
        flows.close()
        server.client().config_set("save", "3600 1")
        works(from_url(server.url, prefix=prefix))


def test_another_layout_is_refused_before_anything_is_written(real_subject: Subject) -> None:
    """Another partition count or layout version: LayoutMismatch with both numbers; without a wish, what is there."""
    flows = real_subject.manager(partitions=4)
    flow = create(flows)
    meta = f"{real_subject.prefix}:meta"
    before = real_subject.snapshot(), real_subject.raw.hgetall(meta)
    with pytest.raises(LayoutMismatch) as mismatch:
        create(real_subject.manager(partitions=8))
    assert (mismatch.value.prefix, mismatch.value.expected, mismatch.value.actual) == (real_subject.prefix, 8, 4)
    assert (real_subject.snapshot(), real_subject.raw.hgetall(meta)) == before
    assert real_subject.manager().get(flow.id) == real_subject.manager(partitions=4).get(flow.id) == flow
    real_subject.raw.hset(meta, "layout", 2)
    with pytest.raises(LayoutMismatch) as mismatch:
        create(real_subject.manager())
    assert (mismatch.value.expected, mismatch.value.actual) == (1, 2)
    assert real_subject.snapshot() == before[0]


def test_a_namespace_says_how_it_is_laid_out(real_subject: Subject) -> None:
    """`<prefix>:meta` has the layout version and the partition count; 16 unless chosen."""
    real_subject.manager().connect()
    meta = real_subject.raw.hgetall(f"{real_subject.prefix}:meta")
    assert meta == {b"layout": b"1", b"partitions": b"16"}
    assert real_subject.all_keys() == []


@pytest.mark.parametrize(
    "meta",
    [
        {"layout": "1", "partitions": "x"},
        {"layout": "1"},
        {"partitions": "x"},
        {"partitions": "0"},
        {"layout": "1", "partitions": "1025"},
        {"layout": "1", "partitions": "000000001999"},
    ],
    ids=str,
)
def test_a_damaged_namespace_is_named(real_subject: Subject, meta: dict[FieldT, EncodableT]) -> None:
    """What cannot be a layout is InvalidData, naming the key."""
    real_subject.raw.hset(f"{real_subject.prefix}:meta", mapping=meta)
    with pytest.raises(InvalidData, match=f"{real_subject.prefix}:meta"):
        real_subject.manager().connect()


@pytest.mark.parametrize("partitions", [None, 5])
def test_half_a_namespace_is_completed(real_subject: Subject, partitions: int | None) -> None:
    """Its creator was cut short behind the partition count, which stays as it is; another wish is refused."""
    meta = f"{real_subject.prefix}:meta"
    real_subject.raw.hset(meta, "partitions", 5)
    with pytest.raises(LayoutMismatch) as mismatch:
        real_subject.manager(partitions=8).connect()
    assert (mismatch.value.expected, mismatch.value.actual) == (8, 5)
    flows = real_subject.manager(partitions=partitions)
    works(flows)
    assert real_subject.raw.hgetall(meta) == {b"layout": b"1", b"partitions": b"5"}
    assert len(flows.namespace.keyspace.partitions) == 5


def test_connecting_touches_no_flow_whatever_its_id(real_subject: Subject) -> None:
    """What is tried at connect is tried on keys that no flow can have, the all-zero UUID's included."""
    flows = real_subject.manager()
    identity = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
    flow = flows.create_mirrored(**identity, flow_id=UUID(int=0))
    flows.record_step_observation(StepObservation(flow.id, "run", "task", "running"))
    real_subject.manager().connect()
    assert flows.get(flow.id) == flow
    assert len(flows.list_events(flow.id)) == 3
    assert len(flows.list_steps(flow.id)) == 1
