"""Sentinels that are gone: who is connected goes on, who is not waits for one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from redisflow import OutcomeUnknown, StorageError
from tests.beyond_one_server.conftest import Open
from tests.support.sentinels import Sentinels
from tests.support.servers import ENGINES
from tests.support.subjects import WHO


def test_without_sentinels_who_is_connected_goes_on_and_who_is_not_waits_for_one(open_url: Open) -> None:
    """Confirmed or not; at the deadline a plain `StorageError`."""
    with Sentinels(ENGINES[0], replicas=1, sentinels=1) as group, ThreadPoolExecutor(2) as pool:
        local = open_url(group.url)
        durable = open_url(group.url, durability="all", confirm_within_s=5.0)
        flow = durable.create_mirrored(**WHO, state={"n": 0})
        assert local.get(flow) == flow
        (sentinel,) = group.sentinels
        sentinel.kill()
        assert local.update_state(flow.id, increment={"n": 1}).state["n"] == 1
        assert durable.update_state(flow.id, increment={"n": 1}).state["n"] == 2
        for level in ("local", "all"):
            with pytest.raises(StorageError) as refused:
                open_url(group.url, durability=level, deadline_s=0.2).update_state(flow.id, increment={"n": 1})
            assert not isinstance(refused.value, OutcomeUnknown)
        waiting = [
            pool.submit(open_url(group.url, durability=level, deadline_s=60.0).get, flow) for level in ("local", "all")
        ]
        group.restart(sentinel)
        assert {job.result(60).revision for job in waiting} == {3}
