"""What the benchmarks report is what they measured."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import attrs
import pytest

from benchmarks import cluster
from benchmarks.cluster import Cost
from benchmarks.lives import create, spread
from benchmarks.measure import Curve, Plan, Row, alone, compare, percentile
from benchmarks.report import README, Result, quote_in_readme
from benchmarks.server import clustering, serving
from redisflow import FlowManager
from redisflow.keys import DEFAULT_PARTITIONS
from tests.support.servers import ENGINES, Engine

RATIO = compare("update", "evalsha", [(90.0, 100.0), (80.0, 100.0), (85.0, 100.0)], unit="calls/s", at_least=0.85)
SLOW = alone("seen", [2.5, 3.5, 1.0], unit="ms", at_most=2)
UNJUDGED = compare("update, two packets", "evalsha", [(1.0, 2.0)], unit="calls/s")
RESULT = Result(
    command="python -m benchmarks --save",
    date="2026-01-31",
    server="valkey-9.1.0",
    versions={"python": "3.11.2", "redisflow": "0.1.0"},
    machine={"arch": "x86_64", "cores": 2, "cpu": "Some CPU"},
    plan=Plan(5),
    rows=[RATIO, SLOW, UNJUDGED],
    curves=[Curve("Latency", "one caller", "percentile", "ms", (("p50", 1.0), ("p99", 2.0)))],
)


@pytest.mark.parametrize(("row", "target", "met"), [(RATIO, "≥ 0.85", True), (SLOW, "≤ 2 ms", False)])
def test_a_row_without_a_yardstick_is_held_against_its_target_itself(row: Row, target: str, met: bool) -> None:
    """The median of ratios, or of the figures in their own unit, decides."""
    assert (row.target, row.met) == (target, met)


def test_a_row_of_one_repeat_has_no_spread() -> None:
    """What is measured once can be shown too."""
    assert UNJUDGED.middle_half == (0.5, 0.5)


def test_percentiles_are_samples() -> None:
    """The smallest that so many per cent of all do not exceed: nothing is made up between two samples."""
    samples = [float(number) for number in range(1000, 0, -1)]
    assert [percentile(samples, percent) for percent in (0, 50, 99.9, 100)] == [1, 500, 999, 1000]


def test_a_saved_result_is_read_as_it_was(tmp_path: Path) -> None:
    """Rows and curves come back value for value."""
    RESULT.save(tmp_path / "results" / "valkey.json")
    assert Result.load(tmp_path / "results" / "valkey.json") == RESULT


def test_the_readme_quotes_what_was_saved(tmp_path: Path) -> None:
    """The rows with a target, of every server, between the markers; the rest of the page stays, however often."""
    readme = tmp_path / "README.md"
    readme.write_bytes(README.read_bytes())
    RESULT.save(tmp_path / "valkey.json")
    attrs.evolve(RESULT, server="redis-7.0.15", rows=[SLOW]).save(tmp_path / "redis.json")
    for _ in range(2):
        quote_in_readme(readme, tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.count("| update | evalsha |  | 0.85 | ≥ 0.85 |\n") == 1
    assert text.count("| seen |  | 2.5 ms, missed | 2.5 ms, missed | ≤ 2 ms |\n") == 1
    assert "two packets" not in text
    how = "2026-01-31, `python -m benchmarks --save`, medians of 5 or more repeats"
    assert f"- valkey-9.1.0: {how}; x86_64, 2 cores of Some CPU; python 3.11.2, redisflow 0.1.0.\n" in text
    before, after = README.read_text(encoding="utf-8").split("<!-- /speed -->")
    assert text.startswith(before.partition("<!-- speed:")[0])
    assert text.endswith(after)


def test_a_readme_without_the_markers_is_left_alone(tmp_path: Path) -> None:
    """It is said, and nothing is written."""
    (tmp_path / "README.md").write_text("# Something else\n")
    RESULT.save(tmp_path / "valkey.json")
    with pytest.raises(SystemExit, match="lacks the lines"):
        quote_in_readme(tmp_path / "README.md", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Something else\n"


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_cluster_is_asked_on_every_master(engine: Engine) -> None:
    """Flows that take the partitions in turn are on all masters, as many as each has of the partitions."""
    with serving(str(engine.binary), aof=True) as server, clustering(server, 3) as found:
        with FlowManager.from_url(found.url, prefix="bench") as flows:
            made = [create(flows, flow_id, uuid4().hex) for flow_id in spread(2 * DEFAULT_PARTITIONS)]
            assert all(flows.get_many(made))
        stored = []
        for master in found.masters:
            with master.client() as client:
                stored.append(len(list(client.scan_iter("*}:flow:*"))))
    assert sum(stored) == len(made)
    assert sorted(stored) in ([8, 12, 12], [10, 10, 12])


def test_the_busiest_node_is_the_limit_of_a_cluster() -> None:
    """With a core each, nodes do what the one that has most to do allows."""
    cost = Cost(rate=50_000, client_us=2, node_us=[10, 8, 7])
    assert cost.with_a_core_each == 100_000
    assert (cost.server_us, cost.busiest, cost.idlest) == (25, 40, 28)
    assert (cost.server_cores, cost.client_cores) == (1.25, 0.1)


def test_a_cluster_is_measured_beside_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    """What a call costs the client has a target; what more cores would do is computed, and both are said."""
    with serving(str(ENGINES[0].binary), aof=True) as server:
        rows = {row.name: row for row in cluster.run(server, Plan(1, quick=True))}
    callers = ("1 thread", "1 task", "50 tasks", "500 tasks")
    assert {name for name, row in rows.items() if row.target} == {
        f"update_state, 3 masters, {who}: client CPU" for who in callers
    }
    assert all(row.target == "≤ 1.15" for row in rows.values() if row.target)
    assert all(row.subject > 0 for row in rows.values())
    busiest_us = (
        rows["sent lives, 3 masters: server CPU"].subject
        * rows["sent lives, 3 masters: busiest node's share of server CPU"].subject
        / 100
    )
    assert rows["sent lives, 3 masters: computed, a core each"].subject == pytest.approx(1e6 / busiest_us)
    notes = capsys.readouterr().out
    assert notes.count("cluster: ") == 3
    assert "sent lives, measured: " in notes
    assert "sent lives, computed: " in notes
