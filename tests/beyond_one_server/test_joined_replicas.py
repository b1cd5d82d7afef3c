"""A replica that joins after the manager has connected is waited for: it may be the next primary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redisflow import NotDurable
from tests.beyond_one_server.conftest import Open
from tests.support.sentinels import Sentinels
from tests.support.servers import ENGINES, Server
from tests.support.subjects import WHO
from tests.support.waiting import wait_until


@pytest.fixture
def group() -> Iterator[Sentinels]:
    """A primary, two replicas, three Sentinels."""
    with Sentinels(ENGINES[0]) as group:
        yield group


@pytest.mark.parametrize("told", [True, False], ids=["told-by-sentinel", "counted-again"])
def test_a_replica_that_joins_and_falls_silent_is_missed(open_url: Open, group: Sentinels, *, told: bool) -> None:
    """No change was made while it was there: only the Sentinels know of it."""
    flows = open_url(group.url, durability="all", confirm_within_s=0.5)
    flow = flows.start_running(flows.create_managed(**WHO))
    with Server(group.engine) as late:
        late.raw.execute_command("REPLICAOF", "127.0.0.1", group.primary().port)
        wait_until(
            lambda: set(group.replicas_known()) == {3}, description="the Sentinels know of the replica", timeout_s=30
        )
        if not told:
            flows = open_url(group.url, durability="all", confirm_within_s=0.5)
        late.pause()
        try:
            with pytest.raises(NotDurable) as raised:
                flows.update_state(flow, {"paid": 1})
        finally:
            late.resume()
        assert (raised.value.wanted, raised.value.reached) == (3, 2)
        settled = flows.with_durability("local").update_state(flow, {"paid": 1}, op_id=raised.value.op_id)
        assert settled.state["paid"] == 1
        assert settled.revision == flow.revision + 1
