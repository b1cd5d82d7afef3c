"""What a server refuses: for now or for good, and never half done."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from redisflow import (
    AsyncFlowManager,
    FlowManager,
    FlowStatus,
    Manual,
    OutcomeUnknown,
    StepObservation,
    StorageError,
    Timer,
    WaitEngine,
)
from tests.support.proxy import PASS, Fault, FaultProxy
from tests.support.resends import IDENTITY, prepared, sent
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until


@pytest.fixture
def lone() -> Iterator[Server]:
    """A server of the test's own, to be put into any state."""
    with Server(ENGINES[0], "--enable-protected-configs", "local") as server:
        yield server


def refusals(server: Server, code: str) -> int:
    """How many times the server has refused a command with that code."""
    stats: dict[str, Any] = server.client().info("errorstats")
    return int(stats.get(f"errorstat_{code}", {"count": 0})["count"])


def replica_of_nobody(server: Server) -> None:
    """READONLY."""
    server.client().replicaof("127.0.0.1", 1)


def primary_again(server: Server) -> None:
    """Take writes."""
    server.client().replicaof("NO", "ONE")


def unable_to_save(server: Server) -> None:
    """MISCONF: a snapshot cannot take the place of a folder."""
    client = server.client()
    (server.directory / "dump.rdb").mkdir()
    client.config_set("save", "3600 100000")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", description="a failed save")


def able_to_save(server: Server) -> None:
    """Take writes all the same."""
    server.client().config_set("stop-writes-on-bgsave-error", "no")


def without_replicas(server: Server) -> None:
    """NOREPLICAS."""
    server.client().config_set("min-replicas-to-write", 1)


def content_without_replicas(server: Server) -> None:
    """Take writes all the same."""
    server.client().config_set("min-replicas-to-write", 0)


PASSING = {
    "READONLY": (replica_of_nobody, primary_again),
    "MISCONF": (unable_to_save, able_to_save),
    "NOREPLICAS": (without_replicas, content_without_replicas),
}


@pytest.mark.parametrize("code", PASSING)
def test_a_passing_refusal_is_waited_out_and_is_no_unknown_outcome(lone: Server, code: str) -> None:
    """Refused, so not executed: tried again till the deadline, then a plain `StorageError`, nothing changed."""
    begin, end = PASSING[code]
    with (
        FlowManager.from_url(lone.url) as patient,
        FlowManager.from_url(lone.url, deadline_s=0.1) as hasty,
        ThreadPoolExecutor(1) as pool,
    ):
        flow = prepared(patient, FlowStatus.RUNNING)
        begin(lone)
        with pytest.raises(StorageError, match=code) as refused:
            hasty.update_state(flow, increment={"n": 1})
        assert not isinstance(refused.value, OutcomeUnknown)
        seen = refusals(lone, code)
        assert seen >= 2
        going = pool.submit(patient.update_state, flow, increment={"n": 1})
        wait_until(lambda: refusals(lone, code) >= seen + 2, description="the second try")
        end(lone)
        assert going.result().state["n"] == 1
        assert len(patient.list_events(flow)) == 3


def test_a_read_from_a_replica_without_its_primary_is_waited_out(lone: Server, direct_lone: FlowManager) -> None:
    """MASTERDOWN: a stale answer is no answer."""
    flow = prepared(direct_lone, FlowStatus.RUNNING)
    lone.client().config_set("replica-serve-stale-data", "no")
    replica_of_nobody(lone)
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(direct_lone.get, flow)
        wait_until(lambda: refusals(lone, "MASTERDOWN") >= 2, description="the second try")
        primary_again(lone)
        assert going.result() == flow


def test_a_server_that_loads_its_data_is_waited_for(lone: Server) -> None:
    """LOADING: neither lost nor refused for good."""
    client = lone.client(socket_timeout=60)
    with FlowManager.from_url(lone.url) as flows, ThreadPoolExecutor(2) as pool:
        flow = prepared(flows, FlowStatus.RUNNING)
        client.mset({f"ballast:{n}": "x" * 5000 for n in range(100)})
        client.config_set("loading-process-events-interval-bytes", 1024)
        client.config_set("key-load-delay", 10_000)  # microseconds a key: a second for all
        loading = pool.submit(client.execute_command, "DEBUG", "RELOAD")
        wait_until(lambda: lone.client().info("persistence")["loading"], description="loading")
        going = pool.submit(flows.update_state, flow, increment={"n": 1})
        assert going.result().state["n"] == 1
        assert loading.result()
    assert refusals(lone, "LOADING") >= 1


def test_a_busy_server_is_waited_for(lone: Server) -> None:
    """BUSY: another connection's script holds the server; it ends, and the call goes through."""
    lone.client().config_set("busy-reply-threshold", 10)
    seen: list[list[bytes]] = []

    def plan(command: list[bytes]) -> Fault:
        seen.append(command)
        return PASS

    with (
        FaultProxy(lone.port, plan) as proxy,
        FlowManager.from_url(lone.url) as direct,
        FlowManager.from_url(proxy.url) as patient,
        FlowManager.from_url(lone.url, deadline_s=0.1) as hasty,
        ThreadPoolExecutor(2) as pool,
    ):
        flow = prepared(direct, FlowStatus.RUNNING)
        endless = pool.submit(lone.client(socket_timeout=60).eval, "while true do end", 0)
        try:
            wait_until(lambda: _is_busy(lone), description="BUSY")
            with pytest.raises(StorageError, match="BUSY") as refused:
                hasty.update_state(flow, increment={"n": 1})
            assert not isinstance(refused.value, OutcomeUnknown)
            going = pool.submit(patient.update_state, flow, increment={"n": 1})
            wait_until(lambda: sum(sent(c) is not None for c in seen) >= 3, description="further tries")
        finally:
            lone.client().script_kill()
        assert going.result().state["n"] == 1
        with pytest.raises(redis.ResponseError):
            endless.result()
        assert len(direct.list_events(flow)) == 3


def _is_busy(server: Server) -> bool:
    try:
        server.client().ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@pytest.mark.parametrize("bound", [False, True], ids=["of-all", "of-one-owner"])
def test_a_server_out_of_memory_refuses_growth_and_lets_work_end(lone: Server, bound: bool) -> None:
    """OOM: creating and growing are refused at once with nothing half done; reading, ending and deleting go on."""
    client = lone.client()
    with FlowManager.from_url(lone.url, deadline_s=60) as manager:
        flows = manager.for_owner("o") if bound else manager
        running = {name: prepared(flows, FlowStatus.RUNNING) for name in ("finish", "fail", "cancel", "delete", "grow")}
        waiting, created = prepared(flows, FlowStatus.WAITING), prepared(flows, FlowStatus.CREATED)
        client.config_set("maxmemory", 1)
        keys, events = client.dbsize(), flows.list_events(running["grow"])
        for growth in (
            lambda: flows.create_managed(**IDENTITY),
            lambda: flows.create_mirrored(**IDENTITY),
            lambda: flows.start_running(created),
            lambda: flows.update_state(running["grow"], {"a": 1}),
            lambda: flows.update_and_append(running["grow"], "note"),
            lambda: flows.mutate(running["grow"], lambda now: now, kind="looked"),
            lambda: flows.append_event(running["grow"], "note"),
            lambda: flows.record_step_observation(StepObservation(running["grow"], "run", "task", "running")),
            lambda: flows.set_waiting(running["grow"], Manual()),
        ):
            with pytest.raises(StorageError, match="out of memory") as refused:
                growth()
            assert not isinstance(refused.value, OutcomeUnknown)
        assert client.dbsize() == keys
        assert flows.list_events(running["grow"]) == events
        assert flows.get_many([running["grow"], created]) == [running["grow"], created]
        assert flows.finish(running["finish"], {"a": 1}).status == "finished"
        assert flows.fail(running["fail"], "broken").status == "failed"
        assert flows.cancel(running["cancel"]).status == "cancelled"
        assert flows.request_cancel(running["grow"]).cancel_requested
        assert flows.resume(waiting).status == "running"
        assert flows.delete(running["delete"])
        assert flows.prune_terminal_flows(timedelta(0)) == 3


def test_a_manager_connects_to_a_server_out_of_memory_to_end_work(lone: Server, direct_lone: FlowManager) -> None:
    """Whoever comes to cancel, finish or delete must get in."""
    doomed, done, flow = [prepared(direct_lone, FlowStatus.RUNNING) for _ in range(3)]
    lone.client().config_set("maxmemory", 1)
    with FlowManager.from_url(lone.url) as flows:
        assert flows.cancel(doomed.id).status == "cancelled"
        assert flows.finish(done).status == "finished"
        assert flows.delete(flow)


def test_the_engine_goes_on_when_the_server_is_out_of_memory(lone: Server) -> None:
    """A tick resumes and cancels all the same."""
    with FlowManager.from_url(lone.url) as flows:
        past = datetime.now(UTC) - timedelta(hours=1)
        due = flows.set_waiting(prepared(flows, FlowStatus.RUNNING), Timer(at=past))
        unwanted = flows.request_cancel(prepared(flows, FlowStatus.WAITING))
        lone.client().config_set("maxmemory", 1)
        report = WaitEngine(flows).tick()
        assert (report.resumed, report.cancelled, report.errors) == (1, 1, 0)
        assert [flow and flow.status for flow in flows.get_many([due, unwanted])] == ["running", "cancelled"]


@pytest.mark.parametrize(
    ("change", "command"),
    [
        *(("create_managed", command) for command in ("evalsha", "hset", "zadd", "xadd", "time", "xlen", "zcard")),
        *(("resume", command) for command in ("evalsha", "hset", "zadd", "xadd", "time", "zrem", "hdel", "hmget")),
    ],
)
def test_a_user_who_lacks_a_command_is_refused_at_once_with_nothing_half_done(
    lone: Server, direct_lone: FlowManager, command: str, change: str
) -> None:
    """NOPERM, of the call or inside the script: a lasting refusal that names the permission, and no torn flow."""
    flow = prepared(direct_lone, FlowStatus.WAITING)
    client = lone.client()
    client.acl_setuser(
        "kate", enabled=True, reset=True, passwords=["+pw"], keys=["*"], commands=["+@all", f"-{command}"]
    )
    url = lone.url.replace("redis://", "redis://kate:pw@")
    before, events, keys = direct_lone.get(flow), direct_lone.list_events(flow), set(client.keys())
    flows = FlowManager.from_url(url, deadline_s=60)
    arguments: Any = ((flow, {"a": 1}), {}) if change == "resume" else ((), IDENTITY)
    with pytest.raises(StorageError, match=r"permission|ACL") as refused:
        getattr(flows, change)(*arguments[0], **arguments[1])
    assert not isinstance(refused.value, OutcomeUnknown)
    flows.close()
    assert direct_lone.get(flow) == before
    assert direct_lone.list_events(flow) == events
    assert set(client.keys()) == keys


@pytest.fixture
def direct_lone(lone: Server) -> Iterator[FlowManager]:
    """A manager of the test's own server."""
    with FlowManager.from_url(lone.url) as flows:
        yield flows


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_refused_at_once(lone: Server, credentials: str) -> None:
    """NOAUTH and WRONGPASS last: one connection, no second try."""
    lone.client().config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        url = proxy.url.replace("redis://", f"redis://{credentials}")
        with pytest.raises(StorageError) as refused:
            FlowManager.from_url(url, deadline_s=20).create_managed(**IDENTITY)
        assert not isinstance(refused.value, OutcomeUnknown)
        assert isinstance(refused.value.__cause__, redis.RedisError)
        assert proxy.connections == 1


@pytest.mark.parametrize("credentials", ["", ":wrong@"])
async def test_asyncio_is_refused_at_once_too(lone: Server, credentials: str) -> None:
    """The same in asyncio."""
    lone.client().config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        url = proxy.url.replace("redis://", f"redis://{credentials}")
        flows = AsyncFlowManager.from_url(url, deadline_s=20)
        with pytest.raises(StorageError) as refused:
            await flows.create_managed(**IDENTITY)
        assert not isinstance(refused.value, OutcomeUnknown)
        assert proxy.connections == 1


def test_a_password_changed_meanwhile_is_no_unknown_outcome(lone: Server, direct_lone: FlowManager) -> None:
    """An idle connection that is cut, and a new one refused: at once, and nothing was sent."""
    flow = prepared(direct_lone, FlowStatus.RUNNING)
    admin = lone.client()
    admin.config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        flows = FlowManager.from_url(proxy.url.replace("redis://", "redis://:right@"), deadline_s=20)
        flows.connect()
        admin.config_set("requirepass", "another")
        proxy.sever()
        wait_until(lambda: len(admin.client_list()) <= 3, description="the proxy's connection to end")
        before = proxy.connections
        with pytest.raises(StorageError):
            flows.update_state(flow, increment={"n": 1})
        assert proxy.connections - before <= 2
        flows.close()


@pytest.mark.parametrize("patient", [True, False])
def test_a_server_with_no_connection_to_spare_is_waited_for(lone: Server, patient: bool) -> None:
    """MAXCLIENTS: nothing ran; a place that becomes free is taken, and none till the deadline is a `StorageError`."""
    admin = lone.client()
    with FlowManager.from_url(lone.url, deadline_s=15 if patient else 0.2) as flows, ThreadPoolExecutor(1) as pool:
        flow = prepared(flows, FlowStatus.RUNNING)
        for connection in admin.client_list():
            if connection["cmd"] != "client|list":
                admin.client_kill(connection["addr"])
        admin.config_set("maxclients", 1)
        rejected = admin.info("stats")["rejected_connections"]
        going = pool.submit(flows.update_state, flow, increment={"n": 1})
        wait_until(
            lambda: going.done() or admin.info("stats")["rejected_connections"] >= rejected + 2,
            description="a second try",
        )
        if patient:
            admin.config_set("maxclients", 100)
            assert going.result().state["n"] == 1
        else:
            with pytest.raises(StorageError):
                going.result()
            admin.config_set("maxclients", 100)
            assert flows.get(flow) == flow
