"""Server CPU per transition: the library's scripts beside the same writes sent raw, and beside WATCH/MULTI.

Subject: the EVALSHA commands of whole lifecycles exactly as the library sends them, built by its own operations
for callers whose copy is current, 100 to a packet. Yardsticks, from the same prepared lives:

- raw: the plain HSET, HDEL, ZREM, ZADD, XADD that leave the same keys behind, of 100 transitions to a packet. They
  check nothing, and others see a flow without its event.
- WATCH/MULTI as redis-py documents it: WATCH, HGETALL, then MULTI, the same writes, EXEC; three round trips. For
  information also in two (WATCH goes with HGETALL). A connection watches for one transaction at a time, so more
  cannot be pipelined; the library one call at a time stands beside it, for information too.

Fair, because a dry run finds the same in the database after each of them, key by key; because bytes are packed
before the clock starts; and because server, transport and values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
import redis

from benchmarks.lives import LIFE, Change, Life, create, is_small, load_scripts, prepare
from benchmarks.measure import Plan, RawConnection, Row, ServerCpu, compare, interleaved, pack
from benchmarks.server import Server
from redisflow import FlowManager

_PER_PACKET = 100
_MIXED = "whole life"
# What differs between two runs of the same life: the server's clock.
_TIMES = (b"created_at", b"updated_at")

Cost = dict[str, float]
Work = Callable[[], None]


@attrs.frozen
class Arena:
    """A server with its connections, and lives to be lived on it again and again."""

    client: redis.Redis
    raw: RawConnection
    flows: FlowManager
    lives: Sequence[Life]

    def live(self, contestant: Callable[[Arena, Sequence[Change]], Work], share: float = 1.0) -> Cost:
        """Live a share of the lives in an empty database. Returns server µs per transition, by verb and in all."""
        lives = self.lives[: max(1, int(len(self.lives) * share))]
        self.client.flushdb()
        for life in lives:
            create(self.flows, life.flow_id, life.op_id)
        cpu = ServerCpu(self.client)
        spent: dict[str, list[float]] = {}
        for number, (verb, *_) in enumerate(LIFE):
            work = contestant(self, [life.changes[number] for life in lives])
            spent.setdefault(verb, []).append(1e6 * cpu.spent_s(work) / len(lives))
        cost = {verb: sum(costs) / len(costs) for verb, costs in spent.items()}
        return cost | {_MIXED: sum(map(sum, spent.values())) / len(LIFE)}

    def left_behind(self) -> dict[bytes, object]:
        """What is in the database, the times of changes aside."""
        return {key: self._content(key) for key in self.raw.ask(b"KEYS", b"*")}

    def _content(self, key: bytes) -> object:
        match self.raw.ask(b"TYPE", key):
            case b"hash":
                parts = self.raw.ask(b"HGETALL", key)
                return {f: v for f, v in zip(parts[::2], parts[1::2], strict=True) if f not in _TIMES}
            case b"stream":
                return [facts for _, facts in self.raw.ask(b"XRANGE", key, b"-", b"+")]
        return sorted(self.raw.ask(b"ZRANGE", key, b"0", b"-1"))


def scripted(arena: Arena, changes: Sequence[Change], per_packet: int = _PER_PACKET) -> Work:
    """What the library does."""
    starts = range(0, len(changes), per_packet)
    calls = [change.script_call(arena.raw.ask(b"HGET", change.flow_key, b"updated_at")) for change in changes]
    packets = [calls[start : start + per_packet] for start in starts]
    packed = [(pack(packet), len(packet)) for packet in packets]

    def work() -> None:
        for packet, count in packed:
            replies = arena.raw.exchange(packet, count)
            assert all(map(is_small, replies)), replies[:3]

    return work


def raw(arena: Arena, changes: Sequence[Change]) -> Work:
    """The same writes and nothing else."""
    starts = range(0, len(changes), _PER_PACKET)
    packets = [[w for c in changes[start : start + _PER_PACKET] for w in c.plain_writes] for start in starts]
    packed = [(pack(packet), len(packet)) for packet in packets]

    def work() -> None:
        for packet, count in packed:
            arena.raw.exchange(packet, count)

    return work


def watched(arena: Arena, changes: Sequence[Change]) -> Work:
    """Optimistic locking as redis-py's documentation has it, section "Pipelines"."""

    def work() -> None:
        for change in changes:
            with arena.client.pipeline() as pipe:
                while True:
                    try:
                        pipe.watch(change.flow_key)  # type: ignore[no-untyped-call]  # redis-py's
                        assert pipe.hgetall(change.flow_key)[b"status"]
                        pipe.multi()
                        for write in change.plain_writes:
                            pipe.execute_command(*write)  # type: ignore[no-untyped-call]  # as above
                        pipe.execute()
                        break
                    except redis.WatchError:
                        continue

    return work


def watched_in_two_packets(arena: Arena, changes: Sequence[Change]) -> Work:
    """The same with the least round trips it can have."""
    packed = [
        (
            pack([(b"WATCH", change.flow_key), (b"HGETALL", change.flow_key)]),
            pack([(b"MULTI",), *change.plain_writes, (b"EXEC",)]),
            len(change.plain_writes) + 2,
        )
        for change in changes
    ]

    def work() -> None:
        for look, write, count in packed:
            arena.raw.exchange(look, 2)
            assert arena.raw.exchange(write, count)[-1] is not None

    return work


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    with (
        server.client() as client,
        RawConnection(server.port) as connection,
        FlowManager(client, prefix="cpu") as flows,
    ):
        load_scripts(flows)
        arena = Arena(client, connection, flows, prepare(flows, plan.size(1000)))
        _require_same_outcome(arena)
        rounds = interleaved(
            plan.repeats,
            lambda: arena.live(scripted),
            lambda: arena.live(raw),
            # A tenth of the lives: each costs some milliseconds, and the cost per transition is what counts.
            lambda: arena.live(watched, 0.1),
            lambda: arena.live(watched_in_two_packets, 0.1),
            lambda: arena.live(partial(scripted, per_packet=1), 0.1),
        )
    for verb in dict.fromkeys([_MIXED, *(verb for verb, *_ in LIFE)]):
        limit = 1.8 if verb == _MIXED else None
        yield _row(f"CPU, {verb}", "same writes, raw", [(r[0][verb], r[1][verb]) for r in rounds], limit)
    mixed = [[cost[_MIXED] for cost in costs] for costs in rounds]
    yield _row(f"CPU, {_MIXED}", "WATCH/MULTI", [(r[0], r[2]) for r in mixed], 0.35)
    yield _row(f"CPU, {_MIXED}", "WATCH/MULTI in two packets", [(r[0], r[3]) for r in mixed])
    yield _row(f"CPU, {_MIXED}, one at a time", "WATCH/MULTI", [(r[4], r[2]) for r in mixed])


def _row(name: str, yardstick: str, pairs: Sequence[tuple[float, float]], at_most: float | None = None) -> Row:
    return compare(name, yardstick, pairs, unit="µs", at_most=at_most)


def _require_same_outcome(arena: Arena) -> None:
    """Run each once on a few lives: all must leave the same behind."""
    few = attrs.evolve(arena, lives=arena.lives[:20])
    outcomes = []
    for contestant in (scripted, raw, watched, watched_in_two_packets):
        few.live(contestant)
        outcomes.append(few.left_behind())
    assert all(outcome == outcomes[0] for outcome in outcomes), "the contestants do not do the same"
