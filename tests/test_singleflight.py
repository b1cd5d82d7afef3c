"""Many who ask at a time are one question, and nobody gets an answer that is older than their asking."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from redisflow import AsyncFlowManager, FlowManager, StorageError
from redisflow.calls import Lost
from redisflow.singleflight import AsyncSingleFlight, SingleFlight
from tests.support.proxy import HANG, PASS, FaultProxy
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until

CROWD = 30


class Oracle:
    """Answers with the number of the question, once it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = threading.Event()
        self.failing = False

    def ask(self) -> int:
        self.asked += 1
        number = self.asked
        assert self.may_answer.wait(30)
        if self.failing:
            raise ConnectionError(str(number))
        return number


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for a crowd."""
    with ThreadPoolExecutor(CROWD + 1) as pool:
        yield pool


def test_a_crowd_of_threads_is_two_questions(pool: ThreadPoolExecutor) -> None:
    """Who comes while the first is asked gets the second's answer, all of them: the first may be out of date."""
    oracle = Oracle()
    flight = SingleFlight[int](oracle.ask)
    first = pool.submit(flight, math.inf)
    wait_until(lambda: oracle.asked == 1, description="the first is asked")
    crowd = [pool.submit(flight, math.inf) for _ in range(CROWD)]
    wait_until(lambda: sum(job.running() for job in crowd) == CROWD, description="all have come")
    time.sleep(0.05)  # for the last to have noted when
    oracle.may_answer.set()
    assert first.result(30) == 1
    assert {job.result(30) for job in crowd} == {2}


def test_who_comes_later_asks_anew() -> None:
    """Unless some slack was granted."""
    oracle = Oracle()
    oracle.may_answer.set()
    strict, slack = SingleFlight[int](oracle.ask), SingleFlight[int](oracle.ask, slack_s=60.0)
    assert [strict(math.inf), strict(math.inf)] == [1, 2]
    assert [slack(math.inf), slack(math.inf)] == [3, 3]


def test_a_failure_is_everybodys(pool: ThreadPoolExecutor) -> None:
    """They would all fail, one after the other."""
    oracle = Oracle()
    oracle.failing = True
    flight = SingleFlight[int](oracle.ask)
    jobs = [pool.submit(flight, math.inf) for _ in range(CROWD)]
    wait_until(lambda: sum(job.running() for job in jobs) == CROWD, description="all have come")
    time.sleep(0.05)  # for the last to have noted when
    oracle.may_answer.set()
    assert all(isinstance(job.exception(30), ConnectionError) for job in jobs)
    assert oracle.asked == 2
    oracle.failing = False
    assert flight(math.inf) == 3


def test_nobody_waits_beyond_the_deadline(pool: ThreadPoolExecutor) -> None:
    """For others who ask, either."""
    oracle = Oracle()
    flight = SingleFlight[int](oracle.ask)
    first = pool.submit(flight, math.inf)
    wait_until(lambda: oracle.asked == 1, description="the first is asked")
    with pytest.raises(Lost, match="deadline") as lost:
        flight(time.monotonic() + 0.02)
    assert not lost.value.sent
    oracle.may_answer.set()
    first.result(30)


def test_a_crowd_of_tasks_is_two_questions() -> None:
    """And when who asked is cancelled, the next one asks."""

    async def main() -> None:
        asked = 0
        may_answer = asyncio.Event()

        async def ask() -> int:
            nonlocal asked
            asked += 1
            number = asked
            await may_answer.wait()
            return number

        flight = AsyncSingleFlight[int](ask)
        first = asyncio.create_task(flight(math.inf))
        await asyncio.sleep(0)
        crowd = [asyncio.create_task(flight(math.inf)) for _ in range(CROWD)]
        await asyncio.sleep(0)
        with pytest.raises(Lost, match="deadline"):
            await flight(time.monotonic() + 0.02)
        first.cancel()
        may_answer.set()
        assert set(await asyncio.gather(*crowd)) == {2}
        assert await flight(math.inf) == 3

    asyncio.run(main())


async def all_fail(flows: AsyncFlowManager) -> None:
    """A crowd of calls, none of which is answered."""
    calls = (flows.get(uuid4()) for _ in range(200))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StorageError}


@pytest.mark.parametrize("known", [True, False], ids=["connected before", "never connected"])
def test_callers_of_a_server_that_does_not_answer_connect_together(known: bool) -> None:
    """One after the other, each would wait out the attempts of all before."""
    with Server(ENGINES[0]) as server, FaultProxy(server.port) as proxy:

        async def main() -> None:
            flows = AsyncFlowManager.from_url(f"{proxy.url}?socket_timeout=0.1", deadline_s=0.2)
            if known:
                await flows.connect()
            before = proxy.connections
            proxy.plan = lambda _: HANG
            proxy.sever()
            await all_fail(flows)
            assert 0 < proxy.connections - before < 100
            proxy.plan = lambda _: PASS
            assert await flows.get(uuid4()) is None
            await flows.aclose()

        asyncio.run(main())


def test_threads_that_find_no_server_fail_together(pool: ThreadPoolExecutor) -> None:
    """Not each after all before."""
    with Server(ENGINES[0]) as server, FaultProxy(server.port, lambda _: HANG) as proxy:
        flows = FlowManager.from_url(f"{proxy.url}?socket_timeout=0.1", deadline_s=0.2)
        calls = [pool.submit(flows.get, uuid4()) for _ in range(CROWD)]
        assert {type(call.exception(60)) for call in calls} == {StorageError}
        assert 0 < proxy.connections < CROWD
        proxy.plan = lambda _: PASS
        assert flows.get(uuid4()) is None
        flows.close()
