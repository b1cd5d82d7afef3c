"""Values to bytes and back, whatever the value; bytes to values or a clear refusal, whatever the bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from redisflow import FlowManager, InvalidData, StepObservation, Timer, WaitEngine
from redisflow.codec import decode, encode_plain, pack, plain, read_event, read_flow, read_step, unpack
from tests.support.model import exact
from tests.support.servers import ENGINES, Server

LUA = Path(__file__).resolve().parents[1] / "lua"
FLOW_ID = UUID(int=7)
INT64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [
        0,
        10**9 - 1,
        10**9,
        10**18,
        -(10**18),
        2**53,
        2**63 - 1,
        -(2**63),
        9_223_372_036 * 10**9,
        -9_223_372_037 * 10**9 + 145_224_192,
    ]
)
QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

odd_zones = st.one_of(
    st.just(UTC),
    st.sampled_from([ZoneInfo("Asia/Kathmandu"), ZoneInfo("Europe/Dublin"), ZoneInfo("Antarctica/Troll")]),
    st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds))),
)
# Two days inside the limits: an offset must not push it over them.
aware = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=odd_zones)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    INT64,
    st.floats(allow_nan=False, allow_infinity=False),
    text,
    st.binary(max_size=20),
    aware,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(text, inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture(scope="module")
def flows(server: Server) -> Iterator[FlowManager]:
    """A manager of it."""
    with FlowManager.from_url(server.url) as flows:
        yield flows


def encode(what: str, value: Any) -> bytes:
    """What an operation makes of a value for one field."""
    return encode_plain(plain(what, value))


def as_stored(value: Any) -> Any:
    """What must come back: lists for tuples, UTC for other zones."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(fold=0)  # in UTC nothing is twice
    if isinstance(value, list | tuple):
        return [as_stored(item) for item in value]
    if isinstance(value, dict):
        return {key: as_stored(item) for key, item in value.items()}
    return value


def nested(depth: int, kind: str) -> Any:
    """Lists, or mappings, `depth` deep."""
    value: Any = [] if kind == "list" else {}
    for _ in range(depth - 1):
        value = [value] if kind == "list" else {"k": value}
    return value


# --- there and back


@QUICK
@given(values)
@example(-0.0)
@example({"": {"a\0": (b"\xff", "é")}})
@example(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
@example(datetime(1, 1, 1, tzinfo=UTC))
@example(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
def test_every_accepted_value_comes_back_equal(value: Any) -> None:
    """Same value, same type: 1, 1.0 and True stay apart; tuples are lists, times are UTC."""
    assert exact(decode(encode("value", value))) == exact(as_stored(value))
    assert exact(unpack(pack("value", value))) == exact(as_stored(value))


@QUICK
@given(values)
def test_the_first_byte_tells_an_integer(value: Any) -> None:
    """Integers are decimal text, which the server can increment; nothing else begins like one."""
    encoded = encode("value", value)
    if type(value) is int:
        assert encoded == str(value).encode()
    else:
        assert encoded[:1] not in {*(b"%d" % digit for digit in range(10)), b"-"}


@pytest.mark.parametrize("kind", ["list", "mapping"])
def test_sixty_four_levels_are_accepted_and_no_more(kind: str) -> None:
    """Depth 64 comes back; 65 is refused."""
    value = nested(64, kind)
    assert decode(encode("value", value)) == value
    assert unpack(pack("value", value)) == value
    with pytest.raises(InvalidData, match="64"):
        encode("value", nested(65, kind))
    with pytest.raises(InvalidData, match="64"):
        pack("value", nested(65, kind))


@settings(QUICK, max_examples=60)
@given(st.one_of(st.dictionaries(text, values, max_size=4), values.filter(lambda value: value is not None)))
def test_every_accepted_state_comes_back_through_a_server(flows: FlowManager, state: Any) -> None:
    """As a flow's state, an event's payload and a step's result, and in the flow a call returns."""
    created = flows.create_managed(
        controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state=state
    )
    expected = exact(as_stored(state))
    read = flows.get(created)
    assert read is not None
    assert exact(read.state) == expected
    assert exact(created.state) == expected
    updated = flows.update_state(flows.update_state(created, None), {"other": 1} if isinstance(state, dict) else state)
    if not isinstance(state, dict):
        assert exact(updated.state) == expected
    event = flows.append_event(created, "note", {"it": state})
    assert exact(event.payload) == {"it": expected}
    assert flows.list_events(created, 1) == [event]
    step = flows.record_step_observation(StepObservation(created, "run", "task", "running", result=state))
    assert exact(step.result) == expected
    assert flows.list_steps(created) == [step]


@pytest.mark.parametrize("depth", [63, 64])
def test_the_deepest_state_comes_back_in_every_place(flows: FlowManager, depth: int) -> None:
    """64 levels are the caller's, wherever the value is stored, and whatever this library wraps around it."""
    state = nested(depth, "mapping")
    flow = flows.create_mirrored(controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state=state)
    assert flow.state == state
    flow = flows.update_state(flow, state)
    flow = flows.resume(flows.set_waiting(flow, {"kind": "own", "x": nested(depth - 1, "mapping")}), state)
    assert flows.append_event(flow, "note", state).payload == state
    assert flows.record_step_observation(StepObservation(flow, "r", "t", "running", result=state)).result == state
    flow = flows.finish(flow, state)
    assert [event.payload for event in flows.list_events(flow)]
    assert flows.get(flow) == flow


refused = st.one_of(
    st.integers(min_value=2**63),
    st.integers(max_value=-(2**63) - 1),
    st.sampled_from(
        [float("nan"), float("inf"), float("-inf"), 1j, object(), {1}, frozenset(), range(3), ..., Exception]
    ),
    st.datetimes(),  # naive
    st.text(st.characters(categories=["Cs"]), min_size=1),
    st.dictionaries(st.integers() | st.binary() | st.none() | st.booleans(), st.none(), min_size=1, max_size=2),
    st.just(bytearray(b"x")),
    st.just({"a": {("t",): 1}}),
)


@QUICK
@given(refused, st.integers(0, 3))
def test_everything_else_is_refused_by_name(value: Any, depth: int) -> None:
    """`InvalidData` before a byte is sent, saying what holds what."""
    for _ in range(depth):
        value = [value]
    for store in (encode, pack):
        with pytest.raises(InvalidData, match="the state"):
            store("the state", value)


def test_a_value_that_contains_itself_is_refused() -> None:
    """The depth limit ends it."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidData):
        encode("value", value)


# --- hostile bytes


@contextmanager
def read_or_refused_by_name() -> Iterator[None]:
    """Let `InvalidData` pass if it names the flow, and nothing else."""
    try:
        yield
    except InvalidData as error:
        if str(FLOW_ID) not in str(error):
            raise


packed = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: msgpack.packb(as_stored(value), datetime=True)),
    values.map(lambda value: encode("v", value)).flatmap(
        lambda whole: st.integers(0, len(whole)).map(lambda end: whole[:end])
    ),
    st.builds(
        lambda code, data: msgpack.packb(msgpack.ExtType(code, data)), st.integers(0, 127), st.binary(max_size=12)
    ),
    st.binary(max_size=12).map(lambda data: bytes([0xC7, len(data), 0xFF]) + data),  # a timestamp of any length
    st.builds(lambda head, data: bytes([head]) + data, st.integers(0, 255), st.binary(max_size=20)),
    st.sampled_from([b"", b"-", b"-0", b"007", b"1_0", b"+1", b" 1", b"9" * 5000, b"9" * 20, b"\xdd\xff\xff\xff\xff"]),
    st.integers(500, 5000).map(lambda depth: b"\x91" * depth),
    st.just(b"\xdf\xff\xff\xff\xff" * 10),
    st.just(b"\xd6\xff\xff\xff\xff\xff"),
    st.just(b"\xc7\x0c\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff"),
)


@settings(QUICK, max_examples=400)
@given(packed)
def test_any_bytes_are_a_value_or_a_value_error(encoded: bytes) -> None:
    """Never another exception: a damaged field must not stop a listing."""
    for read in (decode, unpack):
        with suppress(ValueError):
            read(encoded)


@pytest.mark.parametrize(
    "bomb", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_a_length_that_the_bytes_do_not_have_reserves_no_memory(bomb: bytes) -> None:
    """Five bytes that claim four billion items stay five bytes."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        decode(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


SOUND_FLOW = {
    b"controller_id": b"c",
    b"goal": b"g",
    b"owner_session_key": b"o",
    b"requester_origin": b"r",
    b"current_step": b"s",
    b"status": b"waiting",
    b"revision": b"3",
    b"etag": b"e",
    b"created_at": b"1700000000000000",
    b"updated_at": b"1700000000000000",
    b"wait": msgpack.packb({"kind": "manual"}),
    b"s:n": b"1",
}


@settings(QUICK, max_examples=400)
@given(st.sampled_from([*SOUND_FLOW, b"s", b"s:\xff", b"unknown"]), packed, st.booleans())
def test_a_flow_with_a_damaged_field_is_read_or_refused_by_name(field: bytes, damage: bytes, gone: bool) -> None:
    """`InvalidData` names the flow."""
    fields = SOUND_FLOW | {field: damage}
    if gone:
        del fields[field]
    with read_or_refused_by_name():
        read_flow(FLOW_ID, [part for pair in fields.items() for part in pair])


@settings(QUICK, max_examples=400)
@given(st.sampled_from([b"rev", b"kind", b"op", b"payload", b"more"]), packed, st.booleans())
def test_an_event_with_a_damaged_field_is_read_or_refused_by_name(field: bytes, damage: bytes, gone: bool) -> None:
    """`InvalidData` names the flow."""
    fields = {b"rev": b"1", b"kind": b"k", b"op": b"o", b"payload": b"\x80"} | {field: damage}
    if gone:
        del fields[field]
    with read_or_refused_by_name():
        read_event(FLOW_ID, [b"1700000000000-0", [part for pair in fields.items() for part in pair]])


@pytest.mark.parametrize("event_id", [b"18446744073709551615-1", b"253402300800000-0", b"0-1"])
def test_an_event_of_an_impossible_time_is_read_or_refused_by_name(event_id: bytes) -> None:
    """An entry somebody else wrote may have any id a stream can have."""
    with read_or_refused_by_name():
        read_event(FLOW_ID, [event_id, [b"rev", b"1", b"kind", b"k", b"op", b"o", b"payload", b"\x80"]])


SOUND_STEP = [b"i" * 16, "1700000000000000", "1700000000000000", None, "run", "task", "managed", "running", None]


@settings(QUICK, max_examples=400)
@given(st.integers(0, 8), values)
@example(0, "sixteen letters!")
@example(0, [0] * 16)
@example(1, "9" * 5000)
@example(2, 10.0**300)
@example(6, ["managed"])
@example(3, 7)
@example(4, None)
@example(5, b"task")
def test_a_step_with_a_damaged_field_is_read_or_refused_by_name(index: int, damage: Any) -> None:
    """`InvalidData` names the flow."""
    fields = [*SOUND_STEP[:index], as_stored(damage), *SOUND_STEP[index + 1 :]]
    with read_or_refused_by_name():
        step = read_step(FLOW_ID, msgpack.packb(fields, datetime=True))
        assert {type(step.run_id), type(step.task)} == {str}
        assert step.child_session_key is None or type(step.child_session_key) is str


@settings(QUICK, max_examples=300)
@given(packed)
def test_any_bytes_are_a_step_or_refused(encoded: bytes) -> None:
    """`InvalidData`, nothing else."""
    with read_or_refused_by_name():
        read_step(FLOW_ID, encoded)


@pytest.mark.parametrize(
    "number", [b"007", b"-0", b"00", b"-01", b"0x10", b"1e3", b" 1", b"", b"nan", b"9223372036854775808"]
)
def test_an_increment_of_what_the_server_cannot_add_to_changes_nothing(
    server: Server, flows: FlowManager, number: bytes
) -> None:
    """The check precedes the first write, and is as strict as the server's own."""
    flow = flows.create_managed(
        controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state={"n": 1, "tmp": 1}
    )
    (key,) = server.client().scan_iter(match=f"*:flow:{flow.id}", count=100_000)
    server.client().hset(key, "s:n", number)
    before = server.client().hgetall(key)
    with pytest.raises(InvalidData):
        flows.update_state(flow.id, {"more": 2}, increment={"n": 1}, unset=["tmp"])
    assert server.client().hgetall(key) == before
    assert len(flows.list_events(flow)) == 1


@pytest.mark.parametrize("junk", [b"junk", b"\xff\xfe", b"00000000-0000-0000-0000-00000000zzzz"])
def test_an_index_entry_that_is_no_flow_spoils_no_listing_and_no_tick(server: Server, junk: bytes) -> None:
    """What somebody else wrote into an index hides no flow of ours, and stops no engine."""
    with FlowManager.from_url(server.url, prefix=f"t{uuid4().hex}", partitions=1) as flows:
        identity: dict[str, Any] = {
            "controller_id": "c",
            "goal": "g",
            "owner_session_key": "o",
            "requester_origin": "r",
        }
        ended = flows.cancel(flows.create_managed(**identity))
        due = flows.set_waiting(flows.create_mirrored(**identity), Timer(at=datetime(2001, 1, 1, tzinfo=UTC)))
        raw = server.client()
        for key in raw.scan_iter(match=f"{{{flows.namespace.prefix}:*", count=100_000, _type="zset"):
            raw.zadd(key, {junk: 0})
        assert [flow.id for flow in flows.list_by_owner("o")] == [due.id, ended.id]
        assert [flow.id for flow in flows.iter_by_status("cancelled")] == [ended.id]
        report = WaitEngine(flows).tick()
        assert report.resumed == 1
        assert flows.prune_terminal_flows(timedelta(0)) == 1


# --- the scripts' own arithmetic


def run(server: Server, include: str, expression: str, rows: list[tuple[Any, ...]]) -> list[bytes]:
    """Evaluate an expression over `row` for each row of arguments, in the server, with an include's functions."""
    source = (
        f"{(LUA / 'include' / include).read_text()}\n"
        "local width, results = tonumber(ARGV[1]), {}\n"
        "for i = 2, #ARGV, width do\n"
        "  local row = {unpack(ARGV, i, i + width - 1)}\n"
        f"  results[#results + 1] = tostring({expression})\n"
        "end\n"
        "return results"
    )
    flat = [part for row in rows for part in row]
    results: Any = server.client().eval(source, 0, len(rows[0]), *flat)
    return list(results)


@QUICK
@given(st.lists(st.tuples(INT64, INT64), min_size=1, max_size=50))
@example([(2**63 - 1, 1), (2**63 - 1, 0), (-(2**63), -1), (-(2**63), 0), (2**63 - 1, -(2**63)), (-(2**63), -(2**63))])
def test_the_scripts_check_of_a_sum_is_exact(server: Server, pairs: list[tuple[int, int]]) -> None:
    """Lua's numbers are doubles; the check agrees with Python's integers at every edge."""
    near = [(a, b) for a, _ in pairs for edge in (2**63 - 1, -(2**63)) for b in (edge - a - 1, edge - a, edge - a + 1)]
    rows = pairs + [(a, b) for a, b in near if -(2**63) <= b < 2**63]
    fits = [result == b"true" for result in run(server, "int64.lua", "sum_fits(row[1], row[2])", rows)]
    assert fits == [-(2**63) <= a + b < 2**63 for a, b in rows]


@QUICK
@given(st.lists(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)), min_size=1, max_size=50))
@example(
    [datetime(2000, 2, 29, 23, 59, 59, 999_999), datetime(2100, 2, 28), datetime(2100, 3, 1), datetime(1970, 1, 1)]
)
@example([datetime(2024, 12, 31, 23, 59, 59, 1), datetime(2025, 1, 1), datetime(2000, 3, 1), datetime(2024, 2, 29)])
def test_the_scripts_calendar_is_pythons(server: Server, moments: list[datetime]) -> None:
    """RFC 3339 of a server time, 1970 to 2200."""
    since = [moment - datetime(1970, 1, 1) for moment in moments]
    rows = [(s.days * 86_400 + s.seconds, s.microseconds) for s in since]
    written = run(server, "rfc3339.lua", "rfc3339(row[1], row[2])", rows)
    assert [text.decode() for text in written] == [moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for moment in moments]


def test_a_failure_is_stamped_with_the_time_of_its_change(flows: FlowManager) -> None:
    """`state["failure"]["at"]` is `updated_at`, in what is returned and in what is stored."""
    for _ in range(20):
        flow = flows.create_mirrored(
            flow_id=uuid4(), controller_id="c", goal="g", owner_session_key="o", requester_origin="r"
        )
        failed = flows.fail(flow, "broken")
        assert datetime.fromisoformat(failed.state["failure"]["at"]) == failed.updated_at
        assert flows.get(flow) == failed
