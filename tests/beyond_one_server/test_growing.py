"""A store on one server becomes a cluster, without a key of it changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from redisflow import ExternalEvent, FlowManager, FlowStatus, Timer, WaitEngine
from redisflow.keys import slot_of
from tests.support.clusters import Cluster
from tests.support.patients import problems
from tests.support.servers import ENGINES, Engine, Server
from tests.support.subjects import WHO, flow_in, observed


def slot_of_key(key: bytes) -> int:
    """As the cluster specification has it: of what is in the first braces, or of the whole key."""
    name = key.decode()
    opened = name.find("{")
    closed = name.find("}", opened + 1)
    return slot_of(name[opened + 1 : closed] if 0 <= opened < closed - 1 else name)


def copy_into(cluster: Cluster, server: Server) -> None:
    """What `redis-cli --cluster import --cluster-copy` does: each key to the node that has its slot."""
    client: Any = server.client()
    for key in client.scan_iter(count=500):
        node = cluster.primary_of(slot_of_key(key))
        client.execute_command("MIGRATE", "127.0.0.1", node.server.port, key, 0, 5000, "COPY")


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_store_grows_into_a_cluster_as_it_is(engine: Engine) -> None:
    """Every flow, trail, step and wait is there, and goes on."""
    with Server(engine) as server, Cluster(engine, replicas=0) as cluster:
        with FlowManager.from_url(server.url) as flows:
            made = [flow_in(flows, status) for status in FlowStatus for _ in range(5)]
            for flow in made:
                flows.record_step_observation(observed(flow.id))
            timer = flow_in(flows, "waiting", wait=Timer(datetime.now(UTC) + timedelta(hours=1)))
            event = flow_in(flows, "waiting", wait=ExternalEvent("approvals", "42"))
            held = flow_in(flows, "running")
            trails = {flow.id: flows.list_events(flow, None) for flow in made}
            counts = flows.count_by_status()
            copy_into(cluster, server)
        with FlowManager.from_url(cluster.url) as flows:
            assert flows.get_many(made) == made
            assert {flow.id: flows.list_events(flow, None) for flow in made} == trails
            assert flows.count_by_status() == counts
            assert len(flows.list_by_owner(WHO["owner_session_key"])) == len(made) + 3
            assert all(len(flows.list_steps(flow)) == 1 for flow in made)
            engine_of = WaitEngine(flows)
            assert engine_of.tick(datetime.now(UTC) + timedelta(hours=2)).resumed == 1
            assert [flow.id for flow in engine_of.resume_waiters("approvals", "42")] == [event.id]
            assert flows.get(timer.id) != timer
            assert flows.finish(held).revision == held.revision + 1
            assert problems(flows.doctor()) == []
            assert sum(client.dbsize() > 0 for client in cluster.clients()) == 3
