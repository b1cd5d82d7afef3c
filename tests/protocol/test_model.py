"""The simulated server answers like real ones: the same commands at the same times, the same replies and data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import attrs
import pytest

from redisflow import Flow, StepObservation
from redisflow.calls import Call, Refusal
from redisflow.ops import changes, records, upkeep
from redisflow.ops.namespace import Target, expectation
from redisflow.scripts import SETTLE
from redisflow.waits import ExternalEvent
from redisflow.wire import refusal_of
from tests.protocol.beginnings import BOUND, LIBRARY, NAMESPACES, NODE_SIZE, copy_of, drawn, flow_id
from tests.protocol.model import Server as Model
from tests.protocol.store import Hash, Stream, id_of
from tests.protocol.workload import VERBS
from tests.support.servers import ENGINES, Server

_SEQUENCES, _CALLS = 3, 500
_NOTED = frozenset({b"STALE", b"ILLEGAL", b"NOT_MAPPING", b"NOT_INTEGER"})
_LONG_AGO_US = 7_200_000_000
_MORE_VERBS: dict[str, Any] = {
    "fail": lambda n, f, e, op: changes.fail(n, f, "broken", expected_revision=e, op_id=op),
    "wait_for_event": lambda n, f, e, op: changes.set_waiting(
        n, f, ExternalEvent("t", "c"), expected_revision=e, op_id=op
    ),
    "replace": lambda n, f, e, op: changes.update_state(
        n, f, "text", next_step="s2", increment=None, unset=(), expected_revision=e, op_id=op
    ),
    "unset": lambda n, f, e, op: changes.update_state(
        n, f, {"p": "x"}, next_step=None, increment={"m": -3}, unset=["r"], expected_revision=e, op_id=op
    ),
    "observe_child": lambda n, f, e, op: records.record_step_observation(
        n, StepObservation(f, "run", "task", "failed", "child"), runtime="managed", expected_revision=e, op_id=op
    ),
}
_EVERY_VERB = VERBS | _MORE_VERBS


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each engine, whose streams are stored in as small nodes as the model's."""
    with Server(request.param, "--stream-node-max-entries", str(NODE_SIZE), "--stream-node-max-bytes", "0") as server:
        yield server


@attrs.define
class _Pair:
    """A real server and the model of one, which are told the same."""

    chance: Random
    connection: Any
    model: Model
    copies: list[list[Flow]] = attrs.field(factory=lambda: [[], []])
    ops: list[str] = attrs.field(factory=list)
    told: list[bytes] = attrs.field(factory=list)

    def real(self, *command: bytes) -> Any:
        """Send a command to the real server."""
        self.connection.send_command(*command)
        try:
            return self.connection.read_response()
        except Exception as error:  # noqa: BLE001 - any reply that is an error
            return refusal_of(error)

    def both(self, command: Sequence[bytes], flow: int) -> tuple[Any, Any]:
        """Send a command to both, to the model at the time at which the real one ran it."""
        before_us, before_ids = self._times(flow)
        real = self.real(*command)
        after_us, after_ids = self._times(flow)
        now_us = [new for old, new in zip(before_us, after_us, strict=True) if new != old]
        now_us += self._refused_at(command, flow, real)
        self.model.now_us = now_us[0] if now_us else self._now_us()
        # Redis 7.0 does not stop the clock for events while a script runs.
        self.model.event_ms = [at[0] for at in after_ids if not before_ids or at > before_ids[-1]]
        return real, self.model.execute(command)

    def _refused_at(self, command: Sequence[bytes], flow: int, reply: Any) -> list[int]:
        """Read when an operation was refused, if that was noted."""
        if not isinstance(reply, list) or reply[0] not in _NOTED:
            return []
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        op = command[3 + int(command[2])]
        score = self.real(b"ZSCORE", partition.seen(str(flow_id(flow)).encode()), op) or b"0"
        return [-1000 * int(score)] if score[:1] == b"-" else []

    def _now_us(self) -> int:
        seconds, micros = self.real(b"TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def _times(self, flow: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Read the times that a script leaves, of a change and of a step; and the ids of the newest two events."""
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        member = str(flow_id(flow)).encode()
        updated_at = self.real(b"HGET", partition.flow(member), b"updated_at")
        step = self.real(b"HGET", partition.steps(member), b"run")
        newest = self.real(b"XREVRANGE", partition.events(member), b"+", b"-", b"COUNT", b"2")
        return (int(updated_at or 0), int(step[37:53]) if step else 0), [id_of(entry[0]) for entry in reversed(newest)]

    # --- drawing

    def command(self, flow: int) -> tuple[bytes, ...]:
        """Draw a command about a flow."""
        chance = self.chance
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        member = str(flow_id(flow)).encode()
        keys = (partition.flow(member), partition.events(member))
        fields: Hash = self.model.db.get(keys[0], {})
        kind = chance.random()
        if kind < 0.15:
            return self._settling(keys, fields)
        call = self._pruning(flow, fields) if kind < 0.2 else self._call(flow, fields)
        source = call.script.source
        refusal = self._refusal(partition.seen(member), call.op_id.encode())
        return call.command(source, self._attempt(keys, fields), refusal, text=self._must_tell(source.sha))

    def _must_tell(self, sha: bytes) -> bool:
        """Draw whether the text of a script is sent: mostly only where the server does not know it."""
        return sha not in self.model.known and self.chance.random() < 0.9

    def _refusal(self, seen_key: bytes, op: bytes) -> bytes:
        """Draw what is known of the operation's last refusal: mostly what is noted."""
        noted = self.model.db.get(seen_key, {}).get(op, 0)
        return b"%d" % noted if noted < 0 and self.chance.random() < 0.5 else self.chance.choice([b"", b"-5"])

    def _attempt(self, keys: Sequence[bytes], fields: Hash) -> bytes:
        """Draw what the attempt knows: mostly the fence that there is."""
        kind = self.chance.random()
        if kind < 0.75:
            return fields.get(b"etag", b"")[33:]
        return b"=" + self._event_id(keys[1]) if kind < 0.9 else self.chance.choice([b"", b"1-0-0", b"=0-0"])

    def _event_id(self, events_key: bytes) -> bytes:
        stream: Stream | None = self.model.db.get(events_key)
        self.told += [entry.id for entry in stream.entries[-2:]] if stream is not None else []
        return self.chance.choice(self.told[-20:] or [b"5-5"])

    def _op_id(self, flow: int) -> str:
        kind = self.chance.random()
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        seen: dict[bytes, int] = self.model.db.get(partition.seen(str(flow_id(flow)).encode()), {})
        refused = [op.decode() for op, score in seen.items() if score < 0]
        if kind < 0.1 and refused:
            return self.chance.choice(refused)
        if kind < 0.3 and self.ops:
            return self.chance.choice(self.ops[-12:])
        number = len(self.ops) + 1
        self.ops.append(drawn(number) if kind < 0.6 else f"{number:032x}")
        return self.ops[-1]

    def _call(self, flow: int, fields: Hash) -> Call:
        """Draw a verb and its arguments, and take its first call of a script."""
        chance = self.chance
        space = NAMESPACES[chance.choice([None, None, BOUND]), chance.choice(["", "", "", "o", "p"])]
        verb = chance.choice([*_EVERY_VERB, *("increment", "append", "create") * 3])
        copies = self.copies[flow]
        ref = chance.choice(copies[-4:]) if copies and chance.random() < 0.6 else flow_id(flow)
        expected = None if chance.random() < 0.8 else chance.choice([0, 1, int(fields.get(b"revision", b"3"))])
        op_id = self._op_id(flow)
        op = _EVERY_VERB[verb](space, ref, expected, op_id if chance.random() < 0.6 else None)
        wanted = next(op)
        if verb == "delete":
            wanted = op.send([[fields.get(name) for name in (b"owner_session_key", b"created_at", b"etag")]])
        assert isinstance(wanted, Call)
        wanted.op_id = op_id
        return wanted

    def _pruning(self, flow: int, fields: Hash) -> Call:
        found = [fields.get(name) for name in (b"owner_session_key", b"created_at", b"etag")]
        before_us = self._now_us() + self.chance.choice([-10_000, 10_000_000])
        target = Target.at(flow_id(flow))
        expected = expectation(target, self.chance.choice([None, None, 1]))
        return upkeep._delete_call(
            NAMESPACES[None, ""], target, found, self._op_id(flow), expected=expected, prune_before_us=before_us
        )

    def _settling(self, keys: tuple[bytes, ...], fields: Hash) -> tuple[bytes, ...]:
        chance = self.chance
        fence = fields.get(b"etag", b"")[33:]
        carried = chance.choice([b"*", b"||", b"|%b|" % fence, b"|7-0-0||%b|" % fence, b"|7-0-0|"])
        upper = chance.choice([b"+", b"+", b"(" + self._event_id(keys[1])])
        count = chance.choice([b"1", b"2", b"100", b"1000"])
        wanted = [op.encode() for op in chance.sample(self.ops, min(len(self.ops), chance.randrange(4)))]
        owner = chance.choice([b"", b"", b"", b"o", b"p"])
        how = (
            (b"EVALSHA", SETTLE.source.sha) if SETTLE.source.sha in self.model.known else (b"EVAL", SETTLE.source.text)
        )
        apart = b"%d" % chance.randrange(len(wanted) + 1)
        if chance.random() < 0.5:
            keys = (*keys, keys[0].replace(b"}:flow:", b"}:seen:"))
        return (*how, b"%d" % len(keys), *keys, owner, carried, upper, count, apart, *wanted)

    # --- what happens beside the scripts

    def disturb(self, flow: int) -> None:
        """Do something to both that is no script's doing."""
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        member = str(flow_id(flow)).encode()
        fields: Hash = self.model.db.get(partition.flow(member), {})
        match self.chance.randrange(4):
            case 0:
                self.real(b"SCRIPT", b"FLUSH", b"SYNC")
                self.model.forget_scripts()
            case 1:
                most = self.chance.randrange(4)
                self.real(b"XTRIM", partition.events(member), b"MAXLEN", b"%d" % most)
                self.model.trim(partition.events(member), most)
            case 2 if b"created_at" in fields:
                long_ago = b"%d" % (self._now_us() - _LONG_AGO_US)
                self.real(b"HSET", partition.flow(member), b"created_at", long_ago)
                fields[b"created_at"] = long_ago
            case 3:
                for op, score in self.model.db.get(partition.seen(member), {}).items():
                    older = score - 4_000_000 if score > 0 else score + 4_000_000
                    self.real(b"ZADD", partition.seen(member), b"%d" % older, op)
                    self.model.db[partition.seen(member)][op] = older
            case _:
                pass

    def remember_copy(self, flow: int) -> None:
        """Keep a copy of the flow as it is, for later calls."""
        partition = NAMESPACES[None, ""].keyspace.partition_of(flow_id(flow))
        fields: Hash = self.model.db.get(partition.flow(str(flow_id(flow)).encode()), {})
        if b"status" in fields:
            self.copies[flow].append(copy_of(flow_id(flow), fields))

    # --- comparing

    def stored(self) -> dict[bytes, Any]:
        """Read all that is on the real server, in the model's form."""
        found: dict[bytes, Any] = {}
        for key in self.real(b"KEYS", b"*"):
            kind = self.real(b"TYPE", key)
            if kind == b"hash":
                found[key] = _pairs(self.real(b"HGETALL", key))
            elif kind == b"zset":
                scored = _pairs(self.real(b"ZRANGE", key, b"0", b"-1", b"WITHSCORES"))
                found[key] = {member: float(score) for member, score in scored.items()}
            else:
                found[key] = [[entry[0], entry[1]] for entry in self.real(b"XRANGE", key, b"-", b"+")]
        return found

    def modelled(self) -> dict[bytes, Any]:
        """Return the same of the model."""
        found: dict[bytes, Any] = {}
        for key, value in self.model.db.items():
            if isinstance(value, Stream):
                found[key] = [entry.wire for entry in value.entries]
            elif value and b":flow:" not in key and b":steps:" not in key:
                found[key] = {member: float(score) for member, score in value.items()}
            elif value:
                found[key] = value
        return found


def _pairs(flat: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _plain(reply: Any) -> Any:
    """Return a reply without the order of a hash's fields, which a server need not keep."""
    if isinstance(reply, Refusal):
        return (reply.code, "" if reply.code == "NOSCRIPT" else reply.message.strip())
    if isinstance(reply, list) and reply and reply[0] == b"FLOW":
        return [b"FLOW", _pairs(reply[1]), *reply[2:]]
    return reply


def test_the_model_answers_like_a_server(server: Server) -> None:
    """Hundreds of calls of all kinds: first attempts, late ones, resends, settlings; and the same data after them."""
    client = server.client(protocol=2)
    told: set[Any] = set()
    for seed in range(_SEQUENCES):
        client.flushall()
        client.script_flush()
        pair = _Pair(Random(seed), client.connection_pool.get_connection(), Model(LIBRARY, NODE_SIZE))
        pair.model.forget_scripts()
        for number in range(_CALLS):
            told.add(_exchange(pair, (seed, number)))
        client.close()
    tags = {b"OK", b"FLOW", b"ABSENT", b"EXISTS", b"STALE", b"ILLEGAL", b"PENDING", b"TERMINAL", b"KEPT", b"DELETED"}
    assert tags | {"FENCED", "REFUSED", "UNSETTLED", "NOSCRIPT"} <= told


def _exchange(pair: _Pair, place: tuple[int, int]) -> Any:
    """Send one command to both. Returns what kind of reply there was."""
    flow = pair.chance.randrange(2)
    if pair.chance.random() < 0.1:
        pair.disturb(flow)
    command = pair.command(flow)
    real, model = pair.both(command, flow)
    assert _plain(model) == _plain(real), (place, command[2:])
    if pair.chance.random() < 0.4:
        pair.remember_copy(flow)
    if place[1] % 10 == 0:
        assert pair.modelled() == pair.stored(), place
        expiring = {key for key in pair.real(b"KEYS", b"*") if pair.real(b"PTTL", key) >= 0}
        assert pair.model.expiring & set(pair.model.db) == expiring
    if isinstance(real, Refusal):
        return real.code
    return real[0] if isinstance(real, list) else b"time"
