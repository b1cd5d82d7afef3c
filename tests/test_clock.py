"""The server's clock: stepped, it makes timers early or late and spoils nothing; its text is what it is everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from redisflow import Flow, FlowManager, FlowStatus, Manual, RevisionMismatch, Timer, WaitEngine
from tests.support.clock import COMPILER, SteppedClock
from tests.support.patients import problems
from tests.support.proxy import CUT_REPLY, PASS, Fault, FaultProxy
from tests.support.resends import prepared, sent
from tests.support.servers import Engine, Server
from tests.support.subjects import NEWEST, WHO, Subject, observed, trail
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import redis

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@attrs.frozen
class Stepped:
    """A server whose clock can be stepped."""

    server: Server
    clock: SteppedClock

    def step(self, by: timedelta) -> None:
        """Have it be off by so much, and wait until the server has looked."""
        self.clock.step(int(by.total_seconds()))
        raw = self.server.client()
        wait_until(
            lambda: abs(now(raw) - datetime.now(UTC) - by) < timedelta(seconds=20), description="the clock is stepped"
        )


@pytest.fixture(params=NEWEST, ids=str)
def stepped(request: pytest.FixtureRequest) -> Iterator[Stepped]:
    """One of the test's own, its clock right so far."""
    if not COMPILER:
        pytest.skip("no C compiler for the clock")
    engine: Engine = request.param
    with (
        TemporaryDirectory(prefix="rf-") as folder,
        SteppedClock(Path(folder)) as clock,
        Server(engine, environment=clock.environment) as server,
    ):
        yield Stepped(server, clock)


def test_timers_follow_the_servers_clock(stepped: Stepped) -> None:
    """Early where it is ahead, late where it is behind, and in time again when it is right again."""
    with FlowManager.from_url(stepped.server.url) as flows:
        engine, today = WaitEngine(flows), datetime.now(UTC)
        soon = flows.set_waiting(prepared(flows, FlowStatus.RUNNING), Timer(today + HOUR))
        due = flows.set_waiting(prepared(flows, FlowStatus.RUNNING), Timer(today - timedelta(minutes=1)))
        stepped.step(-HOUR)
        assert engine.tick().resumed == 0
        stepped.step(timedelta(0))
        assert engine.tick().resumed == 1
        assert [flow and flow.status for flow in flows.get_many([due, soon])] == ["running", "waiting"]
        stepped.step(2 * HOUR)
        assert engine.tick().resumed == 1
        assert flows.wait_for(soon, "running", timeout=0).revision == soon.revision + 1


@pytest.mark.parametrize("by", [-400 * DAY, -HOUR, HOUR, 400 * DAY], ids=str)
def test_a_step_spoils_nothing(stepped: Stepped, by: timedelta) -> None:
    """Nothing expires, event ids go on growing, a follower misses nothing, and a listing and a prune come to an end."""
    with FlowManager.from_url(stepped.server.url) as flows:
        made = [flows.create_mirrored(**WHO, state={"n": 0}) for _ in range(5)]
        flows.record_step_observation(observed(made[0].id))
        last = flows.list_events(made[0], limit=1)[0]
        stepped.step(by)
        for number, flow in enumerate(made):
            made[number] = flows.update_state(flows.set_waiting(flow, Manual()), increment={"n": 1})
        made.append(flows.create_mirrored(**WHO, state={"n": 1}))
        assert flows.get_many(made) == made
        assert {flow.id for flow in flows.iter_by_status("running", page=2)} == {made[-1].id}
        assert {flow.id for flow in flows.iter_by_owner(WHO["owner_session_key"], page=2)} == {f.id for f in made}
        for flow in made:
            ids = [tuple(map(int, event.id.split("-"))) for event in flows.iter_events(flow)]
            assert ids == sorted(set(ids))
        assert [event.kind for event in flows.iter_events(made[0], after=last.id)] == ["waiting", "state_updated"]
        assert flows.list_steps(made[0])[0].run_id == observed(made[0].id).run_id
        assert flows.prune_terminal_flows(timedelta(0)) == 0
        assert problems(flows.doctor()) == []
        raw = stepped.server.client()
        assert {raw.pttl(key) for key in raw.scan_iter()} == {-1}


@pytest.mark.parametrize("seconds", [-45, 45])
def test_a_resend_behind_a_step_is_found(stepped: Stepped, seconds: int) -> None:
    """Stepped between the two sendings; and others have written more meanwhile than what is looked through anyway."""
    with FaultProxy(stepped.server.port) as proxy, FlowManager.from_url(stepped.server.url) as direct:
        flow = prepared(direct, FlowStatus.RUNNING)
        direct.update_state(prepared(direct, FlowStatus.RUNNING), increment={"n": 1})  # the server knows the script
        resent: list[tuple[object, ...]] = []

        def plan(command: list[bytes]) -> Fault:
            if (call := sent(command)) is None:
                return PASS
            if not call[2]:
                return CUT_REPLY
            if not resent:
                stepped.step(timedelta(seconds=seconds))
                for n in range(250):
                    direct.append_event(flow, "aside", n)
                direct.update_state(flow.id, increment={"aside": 1})
            resent.append(call)
            return PASS

        with FlowManager.from_url(proxy.url) as flows:
            proxy.plan = plan
            after = flows.update_state(flow, increment={"n": 1})
        assert len(set(resent)) == 1  # the server may have to be sent the script
        assert (after.state["n"], after.state["aside"], after.revision) == (1, 1, flow.revision + 2)
        assert direct.get(flow) == after


# --- its text ------------------------------------------------------------------------------------------


def test_a_time_in_the_first_tenth_of_a_second_is_written_whole(real_subject: Subject) -> None:
    """TIME's second number is not padded: 5 microseconds past the second are not 5 tenths."""
    flows = real_subject.manager()
    flow = flows.create_mirrored(**WHO)
    changes: list[Callable[[], datetime]] = [
        lambda: flows.create_managed(**WHO).created_at,
        lambda: flows.update_state(flow.id, {"x": 1}).updated_at,
        lambda: flows.record_step_observation(observed(flow.id)).updated_at,
        lambda: datetime.fromisoformat(flows.fail(flows.create_mirrored(**WHO), "broken").state["failure"]["at"]),
    ]
    for change in changes:

        def is_early(change: Callable[[], datetime] = change) -> bool:
            before, at, after = now(real_subject.raw), change(), now(real_subject.raw)
            assert before <= at <= after
            return at.microsecond < 100_000

        wait_until(is_early, description="a change in the first tenth of a second", timeout_s=30)


def now(raw: redis.Redis) -> datetime:
    """What the server's clock says."""
    reply: Any = raw.time()
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=reply[0], microseconds=reply[1])


@pytest.mark.parametrize("revision", [999_999, 10**14 - 1, 10**15, 2**53 - 2])
def test_a_large_revision_loses_no_digit(real_subject: Subject, revision: int) -> None:
    """By flow and by id; Lua writes large numbers short."""
    flows = real_subject.manager()
    flow: Flow = flows.create_mirrored(**WHO)
    real_subject.raw.hset(real_subject.flow_key(flow.id), "revision", revision)
    held = flows.get(flow)
    by_id = flows.update_state(flow.id, {"x": 1})
    assert by_id.revision == flows.get(flow).revision == revision + 1
    assert trail(flows, flow)[-1][1] == revision + 1
    with pytest.raises(RevisionMismatch) as stale:
        flows.update_state(held, {"x": 2}, expected_revision=held.revision)
    assert (stale.value.expected, stale.value.actual) == (revision, revision + 1)
