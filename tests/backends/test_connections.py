"""Connections: processes, event loops, servers that are away, more callers than there are connections."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from redisflow import AsyncFlowManager, FlowManager, OutcomeUnknown, StorageError
from tests.support.servers import ENGINES, Server, _free_port
from tests.support.subjects import WHO, create, trail, works
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]

FORK = """
    import os, sys
    from redisflow import FlowManager

    flows = FlowManager.from_url(sys.argv[1], prefix=sys.argv[2])
    who = dict(controller_id="c", goal="g", owner_session_key="o", requester_origin="r")
    flow = flows.create_mirrored(**who, state={"n": 0})
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            for _ in range(50):
                flows.update_state(flow, increment={"n": 1})
            os._exit(0)
        children.append(child)
    for _ in range(50):
        flows.update_state(flow, increment={"n": 1})
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    flow = flows.get(flow.id)
    assert flow.state == {"n": 200}, flow
    assert flow.revision == 201
    flows.close()
"""
ASYNC_FORK = """
    import asyncio, os, sys
    from redisflow import AsyncFlowManager, StorageError

    flows = AsyncFlowManager.from_url(sys.argv[1], prefix=sys.argv[2])
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(flows.count_by_status())
    child = os.fork()
    if child == 0:
        for used in (loop, asyncio.new_event_loop()):
            try:
                used.run_until_complete(flows.count_by_status())
            except StorageError as error:
                assert "process" in str(error), error
            else:
                os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert loop.run_until_complete(flows.count_by_status())
    loop.run_until_complete(flows.aclose())
    loop.close()
"""


@pytest.mark.parametrize("script", [FORK, ASYNC_FORK], ids=["sync", "asyncio"])
def test_a_forked_child_does_not_share_its_parents_connections(server: Server, prefix: str, script: str) -> None:
    """Both go on: the sync child over connections of its own, the asyncio one with a clear error."""
    command = [sys.executable, "-c", textwrap.dedent(script), server.url, prefix]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_manager_belongs_to_one_event_loop(server: Server, prefix: str) -> None:
    """Used from another loop: StorageError says so; the first loop goes on; after closing, any loop will do."""
    flows = AsyncFlowManager.from_url(server.url, prefix=prefix)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        flow = first.run_until_complete(flows.create_managed(**WHO))
        with pytest.raises(StorageError, match="event loop"):
            second.run_until_complete(flows.get(flow.id))
        assert first.run_until_complete(flows.get(flow.id)) == flow
        first.run_until_complete(flows.aclose())
        assert second.run_until_complete(flows.get(flow.id)) == flow
        second.run_until_complete(flows.aclose())
    finally:
        first.close()
        second.close()


def test_a_server_that_is_not_there_is_a_storage_error(from_url: Any, prefix: str) -> None:
    """Tried until the deadline, then StorageError with the client's own error as its cause."""
    port = _free_port()
    flows = from_url(f"redis://127.0.0.1:{port}/0", prefix=prefix, deadline_s=0.3)
    begun = time.monotonic()
    with pytest.raises(StorageError) as away:
        flows.connect()
    assert not isinstance(away.value, OutcomeUnknown)
    assert isinstance(away.value.__cause__, redis.ConnectionError)
    assert time.monotonic() - begun < 10


def test_a_wrong_password_is_not_tried_again(prefix: str, from_url: Any) -> None:
    """No deadline is waited for; the right one works."""
    with Server(ENGINES[0], "--requirepass", "secret") as server:
        url = f"redis://:{{}}@127.0.0.1:{server.port}/0"
        with pytest.raises(StorageError) as refused:
            from_url(url.format("wrong"), prefix=prefix, deadline_s=600).connect()
        assert "secret" not in str(refused.value)
        with pytest.raises(StorageError):
            from_url(server.url, prefix=prefix, deadline_s=600).connect()
        works(from_url(url.format("secret"), prefix=prefix))


def test_an_unknown_outcome_is_settled_by_its_op_id(prefix: str, from_url: Any) -> None:
    """No reply within the deadline: OutcomeUnknown; the same verb with its op id answers what became of it."""
    with Server(ENGINES[0]) as server:
        flows = from_url(f"{server.url}?socket_timeout=0.2", prefix=prefix, deadline_s=0.5)
        flow = flows.start_running(create(flows))
        server.pause()
        with pytest.raises(OutcomeUnknown) as unknown:
            flows.update_state(flow, increment={"processed": 1})
        with pytest.raises(StorageError) as away:
            flows.get(flow.id)
        assert not isinstance(away.value, OutcomeUnknown)
        server.resume()
        settled = wait_until(
            lambda: flows.update_state(flow, increment={"processed": 1}, op_id=unknown.value.op_id),
            description="the server answers again",
            ignoring=(StorageError,),
        )
        assert (settled.state["processed"], settled.revision, settled.etag) == (1, 2, unknown.value.op_id)
        assert len(trail(flows, flow)) == 3


def test_a_manager_survives_a_restart(prefix: str, from_url: Any) -> None:
    """Connections and scripts are gone, flows are not: the next call works."""
    with Server(ENGINES[0]) as server:
        flows = from_url(server.url, prefix=prefix)
        flow = flows.start_running(create(flows))
        server.restart()
        flow = flows.update_state(flow, {"x": 1})
        assert flows.get(flow.id) == flow
        server.client().script_flush()
        assert flows.finish(flow).status == "finished"


def test_a_closed_manager_opens_again(server: Server, prefix: str, from_url: Any) -> None:
    """Closing twice is no error; the next use connects anew."""
    flows = from_url(server.url, prefix=prefix)
    flow = create(flows)
    flows.close()
    flows.close()
    assert flows.get(flow.id) == flow


def test_the_context_connects_and_closes(server: Server, prefix: str) -> None:
    """`with` checks the server at once, and leaves no connection."""
    name = f"conn-{prefix}"
    with FlowManager.from_url(f"{server.url}?client_name={name}", prefix=prefix) as flows:
        flow = create(flows)
        list(flows.watch(flow, timeout=0.01))
        assert [c for c in server.client().client_list() if c["name"] == name]
    wait_until(
        lambda: not [c for c in server.client().client_list() if c["name"] == name],
        description="the connections are closed",
    )


def test_more_callers_than_connections_take_turns(server: Server, prefix: str, from_url: Any) -> None:
    """A blocking pool: nobody is turned away."""
    flows = from_url(server.url, prefix=prefix, max_connections=1)
    flow = flows.start_running(create(flows))
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(flows.update_state, flow, increment={"processed": 1}) for _ in range(80)]
        assert {call.result(30).revision for call in calls} == set(range(2, 82))


async def test_a_cancelled_call_leaves_no_reply_behind(server: Server, prefix: str) -> None:
    """Its connection is not used again: every later call gets its own answer."""
    async with AsyncFlowManager.from_url(server.url, prefix=prefix, max_connections=2) as flows:
        made = [await flows.create_managed(**WHO, state={"n": n}) for n in range(10)]
        for n in range(100):
            task = asyncio.create_task(flows.get(made[n % 10].id))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            other = made[(n + 3) % 10]
            assert await flows.get(other.id) == other
        assert await flows.prune_terminal_flows(timedelta(0)) == 0
