"""Handed-in clients: taken as they are, but for resending."""

from __future__ import annotations

from typing import Any

import pytest
import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from redisflow import AsyncFlowManager, Flow, FlowManager, InvalidData
from redisflow.scripts import SETTLE
from tests.support.proxy import CUT_REPLY, PASS, Fault, FaultProxy
from tests.support.resends import sent
from tests.support.servers import Server
from tests.support.subjects import STATE, WHO, create, trail, works

CLIENT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"decode_responses": True},
    {"protocol": 3},
    {"protocol": 3, "decode_responses": True, "encoding": "latin-1"},
    {"health_check_interval": 1, "client_name": "mine"},
    {"socket_timeout": 0.5, "max_connections": 2},
]


@pytest.mark.parametrize("options", CLIENT_OPTIONS, ids=str)
def test_a_client_is_taken_as_it_is(server: Server, prefix: str, options: dict[str, Any]) -> None:
    """Whatever it was set up with, flows come whole; the client itself goes on working as before."""
    client = redis.Redis(port=server.port, **options)
    with FlowManager(client, prefix=prefix) as flows:
        works(flows)
        flow = create(flows, state={"bytes": b"\xff", "text": "ü"})
        stored = flows.get(flow.id)
        assert stored is not None
        assert stored.state == {"bytes": b"\xff", "text": "ü"}
    assert client.ping()
    assert isinstance(client.echo("x"), str if options.get("decode_responses") else bytes)
    client.close()


@pytest.mark.parametrize("options", CLIENT_OPTIONS, ids=str)
async def test_an_asyncio_client_is_taken_as_it_is(server: Server, prefix: str, options: dict[str, Any]) -> None:
    """The same for asyncio."""
    client = redis.asyncio.Redis(port=server.port, **options)
    async with AsyncFlowManager(client, prefix=prefix) as flows:
        flow = await flows.create_managed(**WHO, state={"bytes": b"\xff", "text": "ü"})
        stored = await flows.get(flow.id)
        assert stored is not None
        assert stored.state == {"bytes": b"\xff", "text": "ü"}
        assert [event.kind async for event in flows.watch(flow, after="0", timeout=0)] == ["created"]
    assert await client.ping()
    await client.aclose()


@pytest.mark.parametrize("cls", [FlowManager, AsyncFlowManager])
def test_what_is_no_client_is_refused(cls: type, server: Server) -> None:
    """The other shell's client, a URL, nothing: InvalidData says what is wanted."""
    wrong = redis.asyncio.Redis() if cls is FlowManager else redis.Redis()
    for client in (wrong, server.url, None, redis.ConnectionPool()):
        with pytest.raises(InvalidData, match="Redis"):
            cls(client)


class Recorder:
    """A proxy's plan: notes the scripts that pass, and loses the reply to the next one when told to."""

    def __init__(self) -> None:
        self.scripts: list[list[bytes]] = []
        self.lose = False

    def __call__(self, command: list[bytes]) -> Fault:
        if command[0] not in {b"EVALSHA", b"EVAL"}:
            return PASS
        self.scripts.append(command)
        lose, self.lose = self.lose, False
        return CUT_REPLY if lose else PASS


def assert_sent_again_by_us(plan: Recorder, flow: Flow) -> None:
    """A call, its settlement and its resend: a client's own would be the first, word for word."""
    first, *others = plan.scripts
    settlement = [command for command in others if command[1] in {SETTLE.source.sha, SETTLE.source.text}]
    resends = [command for command in others if command not in settlement]
    for commands in (settlement, resends):
        assert 1 <= len(commands) <= 2  # the server may have to be told the script
    assert others == [*settlement, *resends]
    for command in (first, *resends):
        call = sent(command)
        assert call is not None
        assert call[:2] == (flow.id, flow.etag.encode())
        assert call[2].startswith(b"=") is (command is not first)


def test_a_clients_own_resending_is_off(server: Server, prefix: str) -> None:
    """A lost reply is followed by our settlement and our resend, which knows its fence: nothing is applied twice."""
    plan = Recorder()
    with FaultProxy(server.port, plan) as proxy:
        client = redis.Redis(port=proxy.port, retry=Retry(ExponentialBackoff(0.001, 0.001), 10))
        with FlowManager(client, prefix=prefix) as flows:
            flow = flows.start_running(create(flows))
            flow = flows.update_state(flow, increment={"processed": 1})
            plan.scripts.clear()
            plan.lose = True
            flow = flows.update_state(flow, increment={"processed": 1})
            assert (flow.state["processed"], flow.revision) == (2, 3)
            assert flows.get(flow.id) == flow
            assert len(trail(flows, flow)) == 4
        assert_sent_again_by_us(plan, flow)
        client.close()


async def test_an_asyncio_clients_own_resending_is_off(server: Server, prefix: str) -> None:
    """The same for asyncio."""
    plan = Recorder()
    with FaultProxy(server.port, plan) as proxy:
        retry = redis.asyncio.retry.Retry(ExponentialBackoff(0.001, 0.001), 10)
        client = redis.asyncio.Redis(port=proxy.port, retry=retry)
        async with AsyncFlowManager(client, prefix=prefix) as flows:
            flow = await flows.create_mirrored(**WHO, state=STATE)
            flow = await flows.update_state(flow, increment={"processed": 1})
            plan.scripts.clear()
            plan.lose = True
            flow = await flows.update_state(flow, increment={"processed": 1})
            assert (flow.state["processed"], flow.revision) == (2, 3)
        assert_sent_again_by_us(plan, flow)
        await client.aclose()
