"""Whether what is stored under one prefix is whole: held against docs/layout.md, and against the rules once more.

To be run while nobody writes. Key names and the forms of values are the library's; every judgement is made here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from redisflow import Flow, InvalidData
from redisflow.codec import read_event, read_flow
from redisflow.keys import LAYOUT_VERSION, MAX_PARTITIONS, Keyspace, meta_key
from tests.chaos.fences import judged_fence, judged_tombstone
from tests.chaos.findings import Acknowledged, Damage, Finding
from tests.chaos.stored import StoredKey, keys_of, paged, values_of
from tests.chaos.trails import judged_changes, judged_seen, judged_steps, judged_trail
from tests.support.model import LEADS_TO

if TYPE_CHECKING:
    import redis


def audit(
    clients: Iterable[redis.Redis],
    prefix: str,
    acknowledged: Iterable[Acknowledged] = (),
    *,
    event_maxlen: int | None = None,
) -> list[Finding]:
    """Return everything that is wrong with a namespace.

    Args:
        clients: one for the server, or one for each primary of a cluster; not decoding responses.
        prefix: the namespace.
        acknowledged: changes that must be in the trails, except in the part that was trimmed away.
        event_maxlen: the least bound of the managers that wrote; `None` where none has one.
    """
    return list(_Audit(acknowledged, event_maxlen).findings(list(clients), prefix))


# --- keys and indexes ------------------------------------------------------------------------------------------

_TYPES = {
    "flow": "hash",
    "events": "stream",
    "steps": "hash",
    "seen": "zset",
    "owner": "zset",
    "status": "zset",
    "due": "zset",
    "waiters": "zset",
}
_INDEXES = {"owner": Damage.OWNER_SET, "status": Damage.STATUS_SET, "due": Damage.DUE, "waiters": Damage.WAITERS}
_OF_FLOWS = {"flow", "events", "steps", "seen"}
_PAGE = 200

Entry = tuple[str, bytes, bytes]  # the kind of an index, its name, a member


class _Audit:
    def __init__(self, acknowledged: Iterable[Acknowledged], event_maxlen: int | None) -> None:
        self._event_maxlen = event_maxlen
        self._acknowledged: dict[UUID, list[Acknowledged]] = defaultdict(list)
        for change in acknowledged:
            self._acknowledged[change.flow_id].append(change)
        self._keys: dict[UUID, dict[str, StoredKey]] = defaultdict(dict)
        self._wanted: dict[Entry, int] = {}
        self._stored: dict[Entry, float] = {}
        self._judged: set[UUID] = set()  # whose hash can be read

    def findings(self, clients: Sequence[redis.Redis], prefix: str) -> Iterator[Finding]:
        keys = list(keys_of(clients, prefix))
        settings = [key for key in keys if key.name == meta_key(prefix).encode()]
        partitions = _partitions_of(settings)
        if partitions is None:
            yield Finding(Damage.META, None, f"{meta_key(prefix)} does not say what layout this is")
            return
        self._keyspace = Keyspace.of(prefix, partitions)
        self._tags = {partition.tag: partition.number for partition in self._keyspace.partitions}
        for key in keys:
            if key not in settings:
                yield from self._key(key)
        for flow_ids in paged(list(self._keys), _PAGE):
            yield from self._flows(flow_ids)
        yield from self._indexes()
        for flow_id, changes in self._acknowledged.items():
            for change in changes:
                yield Finding(Damage.LOST, flow_id, f"{change}: there is no such flow")

    def _key(self, key: StoredKey) -> Iterator[Finding]:
        """Judge a key by its name and type, and note what it holds."""
        flow_id = _uuid(key.rest) if key.kind in _OF_FLOWS else None
        if not _is_known(key, flow_id):
            yield Finding(Damage.UNKNOWN_KEY, None, f"{key.name!r}")
            return
        if key.kind == "scratch":
            yield Finding(Damage.SCRATCH, None, f"{key.name!r}")
            return
        number = self._tags.get(key.tag)
        is_at_home = number is not None and (flow_id is None or number == self._number_of(flow_id))
        if not is_at_home:
            yield Finding(Damage.WRONG_PARTITION, flow_id, f"{key.name!r}")
        if key.expires and key.kind != "flow":  # what is left of a deleted flow expires, see `_flow`
            yield Finding(Damage.EXPIRY, flow_id, f"{key.name!r}")
        if key.type != _TYPES[key.kind]:
            yield Finding(Damage.WRONG_TYPE, flow_id, f"{key.name!r} is a {key.type}")
        if flow_id is not None and (is_at_home or key.kind not in self._keys[flow_id]):
            self._keys[flow_id][key.kind] = key
        elif flow_id is None and key.type == _TYPES[key.kind]:
            yield from self._entries(key, number)

    def _number_of(self, flow_id: UUID) -> int:
        return self._keyspace.partition_of(flow_id).number

    def _entries(self, key: StoredKey, number: int | None) -> Iterator[Finding]:
        """Note the members of an index of a partition."""
        (members,) = values_of([key])
        for member, score in members:
            flow_id = _member_id(key.kind, member)
            if flow_id is not None and number not in {None, self._number_of(flow_id)}:
                yield Finding(Damage.WRONG_PARTITION, flow_id, f"{member!r} in {key.name!r}")
            self._stored[key.kind, key.rest or b"", member] = score

    def _indexes(self) -> Iterator[Finding]:
        """Compare what the indexes hold with what the hashes say."""
        for (kind, name, member), score in self._wanted.items():
            where, stored = _index(kind, name), self._stored.get((kind, name, member))
            flow_id = _member_id(kind, member)
            if stored is None:
                yield Finding(_INDEXES[kind], flow_id, f"is not in {where}, where it belongs at {score}")
            elif stored != score:
                yield Finding(_INDEXES[kind], flow_id, f"is in {where} at {stored:.0f}, and belongs at {score}")
        for kind, name, member in self._stored.keys() - self._wanted.keys():
            where, flow_id = _index(kind, name), _member_id(kind, member)
            if flow_id in self._judged:
                yield Finding(_INDEXES[kind], flow_id, f"is in {where}, where it does not belong")
            elif flow_id is None or "flow" not in self._keys.get(flow_id, ()):
                yield Finding(Damage.ORPHAN, flow_id, f"{member!r} in {where}")

    # --- flows ---

    def _flows(self, flow_ids: Sequence[UUID]) -> Iterator[Finding]:
        """Read flows with all that is theirs, and judge them."""
        keys = [key for flow_id in flow_ids for key in self._keys[flow_id].values()]
        values = dict(zip(keys, values_of(keys), strict=True))
        for flow_id in flow_ids:
            held = self._keys[flow_id]
            flow_key = held.get("flow")
            is_gone = flow_key is not None and flow_key.type == "hash" and b"gone" in values[flow_key]
            if flow_key is not None and flow_key.expires != is_gone:
                sentence = f"{flow_key.name!r} {'expires' if flow_key.expires else 'is a tombstone for ever'}"
                yield Finding(Damage.EXPIRY, flow_id, sentence)
            if flow_key is None or is_gone:
                for kind in held.keys() - {"flow"}:
                    yield Finding(Damage.ORPHAN, flow_id, f"{kind} without a flow")
            if flow_key is not None and is_gone:
                self._judged.add(flow_id)
                yield from judged_tombstone(flow_id, values[flow_key])
            if flow_key is None or is_gone:
                continue
            changes = self._acknowledged.pop(flow_id, [])
            if all(key.type == _TYPES[kind] for kind, key in held.items()):
                yield from self._flow(flow_id, {kind: values[key] for kind, key in held.items()}, changes)

    def _flow(self, flow_id: UUID, held: Mapping[str, Any], changes: Sequence[Acknowledged]) -> Iterator[Finding]:
        try:
            flow = _read_flow(flow_id, held["flow"])
            wanted = _index_entries(flow)
        except (InvalidData, KeyError, TypeError, ValueError) as error:  # of a wait, too
            yield Finding(Damage.FLOW, flow_id, repr(error))
            return
        self._judged.add(flow_id)
        self._wanted |= wanted
        try:
            events = [read_event(flow_id, (entry_id, _flat(fields))) for entry_id, fields in held.get("events", ())]
        except InvalidData as error:
            yield Finding(Damage.EVENT, flow_id, error.reason)
            return
        yield from judged_fence(flow_id, held["flow"], events)
        yield from judged_trail(flow, events, self._event_maxlen)
        yield from judged_steps(flow_id, held.get("steps", {}), events)
        yield from judged_seen(flow_id, held.get("seen", ()), events)
        yield from judged_changes(changes, events)


def _partitions_of(settings: Sequence[StoredKey]) -> int | None:
    """The partition count of a namespace; `None` where it is not said, or for a layout other than ours."""
    if len(settings) != 1 or settings[0].type != "hash":
        return None
    (fields,) = values_of(settings)
    count = fields.get(b"partitions", b"")
    if set(fields) != {b"layout", b"partitions"} or fields[b"layout"] != b"%d" % LAYOUT_VERSION:
        return None
    return int(count) if count.isdigit() and 1 <= int(count) <= MAX_PARTITIONS else None


def _is_known(key: StoredKey, flow_id: UUID | None) -> bool:
    """Whether the layout has keys of such a name."""
    match key.kind:
        case "flow" | "events" | "steps" | "seen":
            return flow_id is not None
        case "owner":
            return bool(key.rest)
        case "status":
            return _text(key.rest) in LEADS_TO
    return key.kind in {"due", "waiters", "scratch"} and key.rest is None


def _member_id(kind: str, member: bytes) -> UUID | None:
    return _uuid(member.rpartition(b"\0")[2] if kind == "waiters" else member)


def _uuid(text: bytes | None) -> UUID | None:
    """Read an id as it stands in keys and indexes."""
    try:
        flow_id = UUID(_text(text))
    except ValueError:
        return None
    return flow_id if str(flow_id).encode() == text else None


def _text(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")


def _index(kind: str, name: bytes) -> str:
    return f"{kind}:{_text(name)}" if name else kind


# --- a flow's hash ---------------------------------------------------------------------------------------------

_FIELDS = {
    b"controller_id", b"goal", b"owner_session_key", b"requester_origin", b"current_step", b"status", b"revision",
    b"etag", b"created_at", b"updated_at", b"cancel_requested", b"wait", b"waiter", b"s", b"created_by", b"life",
    b"past",
}  # fmt: skip
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIMED = {"timer": ("at", "deadline"), "external_event": ("deadline",), "manual": ("deadline",)}


def _flat(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [piece for pair in fields.items() for piece in pair]


def _read_flow(flow_id: UUID, fields: Mapping[bytes, bytes]) -> Flow:
    """Decode a hash.

    Raises:
        InvalidData: it holds what does not go together.
    """
    flow = read_flow(flow_id, _flat(fields))
    if flow is None:
        raise AssertionError  # a hash is never empty
    unknown = [field for field in fields if field not in _FIELDS and not field.startswith(b"s:")]
    if unknown:
        raise InvalidData(f"fields the layout does not have: {unknown}")
    if b"s" in fields and any(field.startswith(b"s:") for field in fields):
        raise InvalidData("a whole state and keys of one")
    if fields.get(b"cancel_requested", b"1") != b"1":
        raise InvalidData("cancel_requested is there, and not 1")
    if (flow.status == "waiting") != (flow.wait is not None):
        raise InvalidData(f"{flow.status}, and {'no wait' if flow.wait is None else 'a wait'}")
    if fields.get(b"waiter", b"") != _waiter(flow.wait):
        raise InvalidData("waiter is not what the wait is for")
    return flow


def _index_entries(flow: Flow) -> dict[Entry, int]:
    """What the indexes must hold of a flow, and at what score."""
    member, updated_us = str(flow.id).encode(), _us(flow.updated_at)
    entries: dict[Entry, int] = {
        ("owner", flow.owner_session_key.encode(), member): _us(flow.created_at),
        ("status", flow.status.encode(), member): updated_us,
    }
    if flow.wait is not None:
        due_us = updated_us if flow.cancel_requested else _due_us(flow.wait)
        entries |= {} if due_us is None else {("due", b"", member): due_us}
        entries |= {("waiters", b"", waiter + member): 0} if (waiter := _waiter(flow.wait)) else {}
    return entries


def _waiter(wait: Mapping[str, Any] | None) -> bytes:
    if wait is None or wait.get("kind") != "external_event":
        return b""
    return f"{wait['topic']}\0{wait['correlation_id']}\0".encode()


def _due_us(wait: Mapping[str, Any]) -> int | None:
    """When time ends a wait."""
    times = [wait[name] for name in _TIMED.get(wait["kind"], ()) if wait.get(name) is not None]
    moments = [datetime.fromisoformat(time) if isinstance(time, str) else time for time in times]
    return min(map(_us, moments), default=None)


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
