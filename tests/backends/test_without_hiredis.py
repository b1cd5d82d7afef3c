"""Where hiredis cannot be had: redis-py packs nothing for us and parses in Python, and all is slower and the same."""

from __future__ import annotations

import subprocess
import sys

from tests.support.servers import Server

LIVED_BOTH_WAYS = """
import asyncio, sys

sys.modules["hiredis"] = None  # what imports it fails, as it would where it is not installed

import redis.utils
from redisflow import AsyncFlowManager, FlowManager

assert not redis.utils.HIREDIS_AVAILABLE
url, prefix = sys.argv[1:]
WHO = dict(controller_id="c", goal="g\\r\\n$3\\r\\n", owner_session_key="o", requester_origin="r")

with FlowManager.from_url(url, prefix=prefix) as flows:
    flow = flows.start_running(flows.create_managed(**WHO, state={"blob": b"\\xff\\r\\n" * 50_000, "none": None}))
    with flows.batch() as batch:
        queued = [batch.update_state(flow.id, increment={"n": 1}) for _ in range(700)]
    flow = flows.finish(queued[-1].result())
    assert flows.get(flow.id) == flow and flow.state["n"] == 700


async def main():
    async with AsyncFlowManager.from_url(url, prefix=prefix) as flows:
        started = await asyncio.gather(*(flows.create_managed(**WHO) for _ in range(100)))
        running = await asyncio.gather(*(flows.start_running(flow) for flow in started))
        ended = await asyncio.gather(*(flows.finish(flow, {"n": n}) for n, flow in enumerate(running)))
        assert await flows.get_many(ended) == ended
        assert [flow.state["n"] for flow in ended] == list(range(100))
        assert [event.kind async for event in flows.watch(ended[0], after="0-0")] == ["created", "started", "finished"]


asyncio.run(main())
print("lived")
"""


def test_both_managers_work_without_hiredis(server: Server, prefix: str) -> None:
    """A life, a batch, a large value and a hundred tasks at once."""
    command = [sys.executable, "-W", "ignore", "-c", LIVED_BOTH_WAYS, server.url, prefix]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "lived\n"), result.stderr
