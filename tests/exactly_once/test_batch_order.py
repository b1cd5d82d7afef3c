"""Each flow's verbs of a batch are all applied, in their order, whatever the server refuses or forgets midway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest
import redis

from redisflow import Flow, FlowManager
from redisflow.flow import FINISH, UPDATE_STATE, Verb
from redisflow.ops.batches import Queued
from redisflow.scripts import UNTRIMMED
from tests.support.proxy import PASS, Fault, FaultProxy, delay
from tests.support.resends import IDENTITY
from tests.support.servers import Engine, Server
from tests.support.subjects import NEWEST
from tests.support.waiting import wait_until

FLOWS = 160  # of each program in a batch
PIECE, BETWEEN_PIECES_S = 20, 0.002  # commands of a packet that the server gets at a time
PATIENT_S = 120.0  # time must not decide
MOST_BATCHES = 200
PUSHED_OUT = 600  # scripts: Valkey keeps 500 of those that it has from EVAL
RESTARTS = 4
NOBODYS_PORT = 1


@attrs.frozen
class Written:
    """A flow, what a batch was to do to it, and what each verb came to."""

    flow_id: UUID
    kinds: tuple[str, ...]
    queued: tuple[Queued[Any], ...]


def write(flows: FlowManager) -> list[Written]:
    """Change flows by a batch: some that exist already, some that it creates. Return what it came to."""
    with flows.batch() as batch:
        existing = [batch.create_mirrored(**IDENTITY, state={"n": 0}) for _ in range(FLOWS)]
    made: list[Flow] = [queued.result() for queued in existing]
    written: list[Written] = []
    with flows.batch() as batch:
        for number, flow in enumerate(made):
            ref: Flow | UUID = flow if number % 2 else flow.id
            verbs = (batch.update_state(ref, {"result": 42}), batch.finish(ref))
            written.append(Written(flow.id, ("created", "started", "state_updated", "finished"), verbs))
            new = uuid4()
            life = (
                batch.create_managed(**IDENTITY, flow_id=new, state={"result": 42}),
                batch.start_running(new),
                batch.finish(new),
            )
            written.append(Written(new, ("created", "started", "finished"), life))
    return written


def verify(flows: FlowManager, written: list[Written]) -> None:
    """Check that no verb was refused, and that each is in the trail, once and in its place."""
    for one in written:
        for queued in one.queued:
            queued.result()
        assert tuple(event.kind for event in flows.iter_events(one.flow_id)) == one.kinds
    for flow in flows.get_many(one.flow_id for one in written):
        assert flow is not None
        assert (flow.status, flow.state["result"]) == ("finished", 42)


@contextmanager
def over_and_over(act: Callable[[], object]) -> Iterator[None]:
    """Do something over and over in a thread, throughout the block."""
    stopped = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stopped.is_set():
                act()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(PATIENT_S)
        assert not thread.is_alive(), "it does not stop"
    if errors:
        raise errors[0]


class InPieces:
    """A plan that forwards packets in pieces, so that what happens to a server happens in the middle of them."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def __call__(self, _: list[bytes]) -> Fault:
        return PASS if next(self._numbers) % PIECE else delay(BETWEEN_PIECES_S)


@pytest.fixture(scope="module", params=NEWEST, ids=str)
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of every engine, to be troubled."""
    engine: Engine = request.param
    with Server(engine, "--appendfsync", "no") as server:
        yield server


def refusals(server: Server, code: str) -> int:
    """Return how many commands the server has refused with a code."""
    told = wait_until(
        lambda: server.raw.info("errorstats"),
        description="the server answers",
        ignoring=(redis.ResponseError,),  # it may be busy
    )
    errors: int = told.get(f"errorstat_{code}", {"count": 0})["count"]
    return errors


def write_through(server: Server, act: Callable[[], object], code: str, wanted: int) -> None:
    """Write batches, and check them, while something is done to the server, until it has refused so many commands."""
    server.raw.config_resetstat()
    prefix = f"t{uuid4().hex}"
    written: list[Written] = []
    with (
        FaultProxy(server.port, InPieces()) as proxy,
        FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=PATIENT_S) as flows,
        FlowManager.from_url(server.url, prefix=prefix, deadline_s=PATIENT_S) as another,
    ):
        with (
            over_and_over(act),
            # Another worker has the server learn the script of a later verb before that of an earlier one.
            over_and_over(lambda: another.finish(another.create_mirrored(**IDENTITY).id)),
        ):
            for _ in range(MOST_BATCHES):
                written += write(flows)
                if refusals(server, code) >= wanted:
                    break
            else:
                pytest.fail(f"the server has not refused {wanted} commands with {code}")
        verify(another, written)


def test_a_server_that_forgets_its_scripts_is_told_them_again(own_server: Server) -> None:
    """SCRIPT FLUSH every few milliseconds: each missing script is sent again, as often as it is missing."""
    admin, pause = own_server.client(), threading.Event()

    def flush() -> None:
        admin.script_flush()
        pause.wait(0.003)

    write_through(own_server, flush, "NOSCRIPT", 2000)


def test_other_programs_may_push_scripts_out_of_the_cache(own_server: Server) -> None:
    """Valkey keeps the 500 scripts that were used last; Redis keeps all."""
    admin, numbers = own_server.client(), count()

    def push_out() -> None:
        pipeline = admin.pipeline(transaction=False)
        for _ in range(PUSHED_OUT):
            pipeline.eval(f"return {next(numbers)}", 0)
        pipeline.execute()

    write_through(own_server, push_out, "NOSCRIPT", 50 if own_server.engine.is_valkey else 0)
    admin.script_flush()


def be_busy(admin: Any) -> None:
    """Run a script for longer than others are made to wait."""
    busy = """local function now() local time = redis.call('TIME') return time[1] * 1000 + time[2] / 1000 end
    local began = now()
    while now() < began + 20 do end"""
    admin.eval(busy, 0)


def be_a_replica(admin: Any) -> None:
    """Follow a primary that does not exist."""
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    admin.execute_command("REPLICAOF", "NO", "ONE")


def lack_replicas(admin: Any) -> None:
    """Want a replica for every write."""
    admin.config_set("min-replicas-to-write", 1)
    admin.config_set("min-replicas-to-write", 0)


PASSING: dict[str, Callable[[Any], None]] = {
    "BUSY": be_busy,
    "READONLY": be_a_replica,
    "NOREPLICAS": lack_replicas,
}


@pytest.mark.parametrize("code", PASSING)
def test_verbs_that_are_refused_in_passing_are_not_overtaken(own_server: Server, code: str) -> None:
    """Some commands in the middle of a packet are refused, those behind them are not."""
    admin, pause = own_server.client(), threading.Event()
    admin.config_set("busy-reply-threshold", 5)

    def refuse() -> None:
        PASSING[code](admin)
        pause.wait(0.03)

    write_through(own_server, refuse, code, 200)


@pytest.mark.parametrize("engine", NEWEST, ids=str)
def test_a_server_that_is_killed_gets_the_rest_of_a_batch_when_it_is_back(engine: Engine) -> None:
    """It has forgotten its scripts, and another worker has had it learn that of a later verb."""
    written: list[list[Written]] = []
    earlier, later = scripts_of(UPDATE_STATE), scripts_of(FINISH)
    in_pieces, reached = InPieces(), threading.Event()

    def plan(command: list[bytes]) -> Fault:
        if command[1:2] and command[1] in earlier:
            reached.set()
        return in_pieces(command)

    with (
        Server(engine, "--appendfsync", "no") as server,
        FaultProxy(server.port, plan) as proxy,
        FlowManager.from_url(proxy.url, prefix="batches", deadline_s=PATIENT_S) as flows,
    ):
        with over_and_over(lambda: written.append(write(flows))):
            for _ in range(RESTARTS):
                reached.clear()
                assert reached.wait(PATIENT_S), "no batch has come so far"
                proxy.target_port = NOBODYS_PORT
                server.kill()
                server.start()
                for text in later.values():
                    server.client().script_load(text.decode())
                proxy.target_port = server.port
                seen = len(written)
                wait_until(lambda: len(written) > seen, description="its batch is carried out", timeout_s=PATIENT_S)  # noqa: B023 - called at once
        for batch in written:
            verify(flows, batch)


def scripts_of(verb: Verb) -> dict[bytes, bytes]:
    """Return the texts of a verb's scripts, by their SHA."""
    sources = [one.script.source for (of, _), one in UNTRIMMED.transitions.items() if of is verb]
    return {source.sha: source.text for source in sources}
