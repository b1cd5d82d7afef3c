"""A process that makes calls for a test: `python -m tests.support.caller SHELL SETTINGS`.

Each line of its input is a list of calls, in JSON, which are made at the same time. It answers by a line that is the
list of their outcomes. A call names the server's URL, the flow, the verb, and perhaps an operation's id. Each flow has
a manager of its own, and with it a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

from redisflow import AsyncFlowManager, FlowError, FlowManager, StepObservation
from tests.support.resends import IDENTITY

VERBS: dict[str, Callable[[Any, UUID, str | None], Any]] = {
    "get": lambda flows, flow_id, _: flows.get(flow_id),
    "create_managed": lambda flows, flow_id, op: flows.create_managed(**IDENTITY, flow_id=flow_id, op_id=op),
    "update_state": lambda flows, flow_id, op: flows.update_state(flow_id, increment={"paid": 1}, op_id=op),
    "append_event": lambda flows, flow_id, op: flows.append_event(flow_id, "paid", op_id=op),
    "record_step_observation": lambda flows, flow_id, op: flows.record_step_observation(
        StepObservation(flow_id, "run", "task", "running"), op_id=op
    ),
}


def carried_out(flows: Any, call: dict[str, Any]) -> Any:
    """Make a call; in asyncio, return what is to be awaited."""
    return VERBS[call["verb"]](flows, UUID(call["flow"]), call.get("op_id"))


def outcome_of(error: FlowError | None) -> dict[str, str]:
    """Return what came of a call, as it is written."""
    if error is None:
        return {"error": "", "op_id": ""}
    return {"error": type(error).__name__, "op_id": getattr(error, "op_id", ""), "message": str(error)}


def answer(outcomes: list[dict[str, str]]) -> None:
    """Write a line for the process that asked."""
    sys.stdout.write(json.dumps(outcomes) + "\n")
    sys.stdout.flush()


def run_sync(settings: dict[str, Any]) -> None:
    """Make calls by sync managers, each call in a thread."""
    managers: dict[str, FlowManager] = {}

    def make(call: dict[str, Any]) -> dict[str, str]:
        try:
            carried_out(managers[call["flow"]], call)
        except FlowError as error:
            return outcome_of(error)
        return outcome_of(None)

    with ThreadPoolExecutor(64) as pool:
        for line in sys.stdin:
            calls = json.loads(line)
            for call in calls:
                if call["flow"] not in managers:
                    managers[call["flow"]] = FlowManager.from_url(call["url"], **settings)
            answer(list(pool.map(make, calls)))
    for manager in managers.values():
        manager.close()


async def run_async(settings: dict[str, Any]) -> None:
    """Make calls by asyncio managers, each call in a task."""
    managers: dict[str, AsyncFlowManager] = {}

    async def make(call: dict[str, Any]) -> dict[str, str]:
        try:
            await carried_out(managers[call["flow"]], call)
        except FlowError as error:
            return outcome_of(error)
        return outcome_of(None)

    while line := await asyncio.to_thread(sys.stdin.readline):
        calls = json.loads(line)
        for call in calls:
            if call["flow"] not in managers:
                managers[call["flow"]] = AsyncFlowManager.from_url(call["url"], **settings)
        answer(await asyncio.gather(*map(make, calls)))
    for manager in managers.values():
        await manager.aclose()


if __name__ == "__main__":
    shell, options = sys.argv[1:]
    if shell == "sync":
        run_sync(json.loads(options))
    else:
        asyncio.run(run_async(json.loads(options)))
