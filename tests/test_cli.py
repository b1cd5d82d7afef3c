"""The command line, through real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import attrs
import click
import pytest

from redisflow import ExternalEvent, FlowManager, FlowStatus, Manual, StepObservation, Timer, cli, errors, render
from tests.support.servers import ENGINES, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MINUTE_S = 60.0


@attrs.frozen
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@attrs.frozen
class Shell:
    """Runs the command on one namespace of one server."""

    url: str
    prefix: str
    flows: FlowManager

    def start(self, *args: str, env: dict[str, str] | None = None, **streams: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "redisflow", "--url", self.url, "--prefix", self.prefix, *args]
        defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A shell that starts tests in the background has them ignore interrupts, and so would this process.
        heeding = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", heeding, *command]
        return subprocess.Popen(command, text=True, env=env or _environment(), **defaults | streams)

    def run(self, *args: str) -> Ran:
        process = self.start(*args)
        out, err = process.communicate(timeout=MINUTE_S)
        return Ran(process.returncode, out, err)

    def make(self, *, owner: str = "agent:kate", goal: str = "triage inbox", state: Any = None) -> Any:
        return self.flows.create_managed(
            controller_id="kate/inbox",
            goal=goal,
            owner_session_key=owner,
            requester_origin="user-1",
            current_step="classify",
            state={"messages": 10} if state is None else state,
        )


def _environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "REDISFLOW_URL"}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **more}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module; every test has a namespace of its own."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture
def shell(server: Server) -> Iterator[Shell]:
    """The command on a namespace of the test's own."""
    prefix = f"cli-{uuid4().hex[:12]}"
    with FlowManager.from_url(server.url, prefix=prefix) as flows:
        yield Shell(server.url, prefix, flows)


# --- looking -------------------------------------------------------------------------------------------


def test_list_as_json_has_every_attribute(shell: Shell) -> None:
    """Programs get datetimes as RFC 3339 and bytes as base64 text."""
    at = datetime(2026, 4, 23, 15, 0, tzinfo=UTC)
    flow = shell.make(state={"raw": b"\xff\x00", "at": at, "big": 2**63 - 1, "name": "é"})
    (listed,) = shell.run("list", "--json").document
    assert listed == {
        "id": str(flow.id),
        "controller_id": "kate/inbox",
        "goal": "triage inbox",
        "owner_session_key": "agent:kate",
        "requester_origin": "user-1",
        "status": "created",
        "cancel_requested": False,
        "current_step": "classify",
        "revision": 0,
        "etag": flow.etag,
        "created_at": flow.created_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "updated_at": flow.updated_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "wait": None,
        "state": {"raw": "/wA=", "at": "2026-04-23T15:00:00.000000Z", "big": 2**63 - 1, "name": "é"},
    }


def test_list_filters_by_owner_and_status_and_says_what_it_left_out(shell: Shell) -> None:
    """--owner and --status narrow, --limit cuts, and a cut is told on standard error."""
    kates = [shell.make(), shell.make()]
    others = shell.flows.start_running(shell.make(owner="agent:joe"))

    def listed(*args: str) -> set[str]:
        return {flow["id"] for flow in shell.run("list", "--json", *args).document}

    assert listed() == {str(flow.id) for flow in [*kates, others]}
    assert listed("--owner", "agent:kate") == {str(flow.id) for flow in kates}
    assert listed("--status", "running") == {str(others.id)}
    assert listed("--owner", "agent:kate", "--status", "running") == set()
    cut = shell.run("list", "--limit", "2", "--json")
    assert len(cut.document) == 2
    assert cut.err == "There are more than 2; --limit shows more.\n"


def test_a_table_in_a_pipe_is_plain_text_with_whole_ids(shell: Shell) -> None:
    """No escape sequences, no cut ids, nothing a hostile goal put there."""
    hostile = shell.make(goal="\x1b[31mred\r\nalert\u202e" + "x" * 300, owner="[bold]markup[/bold]")
    ran = shell.run("list")
    lines = ran.out.splitlines()
    assert str(hostile.id) in ran.out
    assert "\x1b" not in ran.out
    assert "\\x1b[31mred\\r\\nalert\\u202e" + "x" * 300 in ran.out
    assert "[bold]markup[/bold]" in ran.out
    assert all(line == line.rstrip() for line in lines)
    assert len(lines) == 2  # head, flow


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_table_on_a_terminal_fits_and_keeps_the_id_whole(shell: Shell, columns: int) -> None:
    """Ids are never cut: a terminal too narrow for them gets lines it wraps itself."""
    flow = shell.make(goal="g" * 300)
    lines = _on_a_terminal(shell, columns, "list").splitlines()
    assert any(str(flow.id) in line for line in lines)
    assert columns == 40 or max(map(len, lines)) <= columns


def _on_a_terminal(shell: Shell, columns: int, *args: str, code: int = 0) -> str:
    ours, theirs = pty.openpty()
    environment = _environment(COLUMNS=str(columns), TERM="xterm")
    process = shell.start(*args, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    chunks = []
    with suppress(OSError):  # how Linux says that the other side is closed
        while chunk := os.read(ours, 65_536):
            chunks.append(chunk)
    os.close(ours)
    assert process.wait(MINUTE_S) == code
    return re.sub(r"\x1b\[[\d;]*m", "", b"".join(chunks).decode())


def test_show_has_the_flow_its_steps_and_its_latest_events(shell: Shell) -> None:
    """One look tells all about a flow."""
    flow = shell.flows.start_running(shell.make())
    shell.flows.record_step_observation(
        StepObservation(flow.id, "run-1", "fetch mail", "succeeded", "agent:child", {"fetched": 3})
    )
    flow = shell.flows.set_waiting(flow, ExternalEvent("approvals", "42"))
    document = shell.run("show", str(flow.id), "--json").document
    assert document["flow"]["wait"] == {"kind": "external_event", "topic": "approvals", "correlation_id": "42"}
    assert [step["run_id"] for step in document["steps"]] == ["run-1"]
    assert [event["kind"] for event in document["events"]] == ["waiting", "step_observed", "started", "created"]
    text = shell.run("show", str(flow.id)).out
    for expected in (
        str(flow.id),
        "approvals",
        "run-1",
        "fetch mail",
        '{"fetched": 3}',
        "step_observed",
        "triage inbox",
    ):
        assert expected in text


def test_events_are_json_lines_oldest_first(shell: Shell) -> None:
    """A program reads one object a line."""
    flow = shell.flows.finish(shell.flows.start_running(shell.make()), {"summary": "done"})
    events = [json.loads(line) for line in shell.run("events", str(flow.id), "--json").out.splitlines()]
    assert [(event["revision"], event["kind"]) for event in events] == [(0, "created"), (1, "started"), (2, "finished")]
    assert events[2]["payload"] == {"final_state": {"summary": "done"}}
    text = shell.run("events", str(flow.id)).out.splitlines()
    assert [line.split()[2] for line in text] == ["created", "started", "finished"]


def test_events_follow_a_flow_to_its_end(shell: Shell) -> None:
    """--follow prints what happened, then what happens, and ends with the flow."""
    flow = shell.make()
    with shell.start("events", "--follow", "--json", str(flow.id)) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["kind"] == "created"
        flow = shell.flows.start_running(flow)
        assert json.loads(process.stdout.readline())["kind"] == "started"
        shell.flows.finish(flow)
        assert json.loads(process.stdout.readline())["kind"] == "finished"
        assert process.stdout.read() == ""
        assert process.wait(MINUTE_S) == 0


def test_stats_count_by_status(shell: Shell) -> None:
    """Counts, their sum, and since when the longest unchanged flow of a status is."""
    running = shell.flows.start_running(shell.make())
    shell.make()
    document = shell.run("stats", "--json").document
    assert document["flows"] == {
        "created": 1, "running": 1, "waiting": 0, "finished": 0, "failed": 0, "cancelled": 0,
    }  # fmt: skip
    assert document["total"] == 2
    assert document["prefix"] == shell.prefix
    assert document["unchanged_since"]["running"] == running.updated_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert document["unchanged_since"]["failed"] is None
    assert str(running.id) in shell.run("stats").out


# --- changing ------------------------------------------------------------------------------------------


def test_cancel_and_its_request(shell: Shell) -> None:
    """`cancel` cancels; `cancel --request` leaves it to whoever works on the flow."""
    flow = shell.flows.start_running(shell.make())
    requested = shell.run("cancel", "--request", str(flow.id))
    assert (requested.code, requested.out) == (0, f"flow {flow.id} is running, cancel requested, at revision 2\n")
    cancelled = shell.run("cancel", str(flow.id), "--json")
    assert cancelled.document["status"] == "cancelled"
    again = shell.run("cancel", str(flow.id))
    assert (again.code, again.out) == (1, "")
    assert again.err == f"Error: flow {flow.id} has ended as cancelled and cannot change\n"


def test_resume_merges_a_patch(shell: Shell) -> None:
    """--patch is merged into the state of the waiting flow."""
    flow = shell.flows.set_waiting(shell.flows.start_running(shell.make()), Manual())
    document = shell.run("resume", str(flow.id), "--patch", '{"approved": true}', "--json").document
    assert (document["status"], document["state"]) == ("running", {"messages": 10, "approved": True})


def test_a_flow_that_moved_on_is_refused(shell: Shell) -> None:
    """Exit code 1: not waiting, another revision, a cancel pending."""
    flow = shell.flows.start_running(shell.make())
    assert shell.run("resume", str(flow.id)).code == 1
    stale = shell.run("cancel", str(flow.id), "--expected-revision", "0")
    assert stale.code == 1
    assert "is at revision 1, expected 0" in stale.err
    waiting = shell.flows.set_waiting(flow, Manual())
    shell.flows.request_cancel(waiting)
    assert shell.run("resume", str(flow.id)).code == 1


def test_prune_counts_before_it_deletes(shell: Shell) -> None:
    """--dry-run counts what would go; live and younger flows stay."""
    live = shell.make()
    ended = shell.flows.cancel(shell.make())
    assert shell.run("prune", "--older-than", "1h").out == "deleted 0 flows\n"
    assert shell.run("prune", "--older-than", "0s", "--dry-run").out == "would delete 1 flow\n"
    assert shell.flows.get(ended.id) is not None
    assert shell.run("prune", "--older-than", "0s", "--json").document == {"pruned": 1, "dry_run": False}
    assert shell.flows.get(ended.id) is None
    assert shell.flows.get(live.id) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_engine_drives_waits_until_it_is_told_to_stop(shell: Shell, number: signal.Signals) -> None:
    """Timers end, requested cancels happen, and a signal ends it with exit code 0 and a tally."""
    timed = shell.flows.set_waiting(
        shell.flows.start_running(shell.make()), Timer(datetime.now(UTC) + timedelta(seconds=0.2))
    )
    asked = shell.flows.set_waiting(shell.flows.start_running(shell.make()), Manual())
    shell.flows.request_cancel(asked)
    with shell.start("engine", "--interval", "0.1") as process:
        shell.flows.wait_for(timed.id, FlowStatus.RUNNING, timeout=MINUTE_S)
        shell.flows.wait_for(asked.id, FlowStatus.CANCELLED, timeout=MINUTE_S)
        process.send_signal(number)
        out, _ = process.communicate(timeout=MINUTE_S)
    assert (process.returncode, out) == (0, "resumed 1, cancelled 1, errors 0\n")


# --- the doctor ----------------------------------------------------------------------------------------


def keys_of(shell: Shell, flow: Any) -> Any:
    """The partition of a flow."""
    return shell.flows.namespace.keyspace.partition_of(flow.id)


def test_the_doctor_finds_a_sound_store_sound(shell: Shell) -> None:
    """Exit code 0, and a document or tables that say what was looked at."""
    shell.flows.start_running(shell.make())
    shell.make()
    ran = shell.run("doctor", "--json")
    document = ran.document
    assert ran.code == 0
    assert (document["prefix"], document["severity"], document["left"], document["mended"]) == (
        shell.prefix,
        "ok",
        {},
        {},
    )
    assert document["flows"] == {
        "created": 1, "running": 1, "waiting": 0, "finished": 0, "failed": 0, "cancelled": 0,
    }  # fmt: skip
    assert {usage["kind"]: usage["keys"] for usage in document["memory"]}["flow"] == 2
    assert all(usage["bytes"] > 0 for usage in document["memory"] if usage["keys"])
    assert {finding["kind"] for finding in document["findings"]} == {
        "server", "eviction", "persistence", "replication", "layout",
    }  # fmt: skip
    told = shell.run("doctor")
    assert told.code == 0
    assert told.out.splitlines()[-1] == "nothing found"
    assert re.search(r"^ok +layout +version 1, 16 partitions$", told.out, re.MULTILINE)


def test_the_doctors_exit_codes_tell_warnings_from_errors_and_what_was_mended_does_not_count(
    shell: Shell, server: Server
) -> None:
    """6 for warnings, 5 for errors, 0 for what is well or well again."""
    flow = shell.make()
    partition, member = keys_of(shell, flow), str(flow.id)
    client = server.client()
    client.xadd(partition.scratch, {"left": "over"})
    assert shell.run("doctor").code == 6
    client.zrem(partition.status(FlowStatus.CREATED), member)
    found = shell.run("doctor")
    assert found.code == 5
    assert re.search(rf"^error +missing-entry +{flow.id}  not in status:created$", found.out, re.MULTILINE)
    assert "→ `redisflow doctor --repair` adds it" in found.out
    assert found.out.splitlines()[-1] == "found missing-entry 1, orphan-key 1"
    document = shell.run("doctor", "--json").document
    (missing,) = [finding for finding in document["findings"] if finding["kind"] == "missing-entry"]
    assert missing == {
        "severity": "error",
        "kind": "missing-entry",
        "what": "not in status:created",
        "flow_id": member,
        "key": partition.status(FlowStatus.CREATED).decode(),
        "advice": "`redisflow doctor --repair` adds it",
        "mended": False,
    }
    mended = shell.run("doctor", "--repair")
    assert mended.code == 0
    assert re.search(rf"^mended +missing-entry +{flow.id}  not in status:created: added$", mended.out, re.MULTILINE)
    assert mended.out.splitlines()[-1] == "mended missing-entry 1, orphan-key 1"
    assert shell.run("doctor").out.splitlines()[-1] == "nothing found"


def test_the_doctor_shows_the_first_of_many(shell: Shell, server: Server) -> None:
    """And says how many more there are; what it mends it tells one by one."""
    due = keys_of(shell, shell.make()).due
    server.client().zadd(due, {f"junk-{n}": n for n in range(50)})
    told = shell.run("doctor")
    assert told.out.count("junk-") == 20
    assert "… and 30 more" in told.out
    assert shell.run("doctor", "--repair").out.count(": removed") == 50


def test_the_doctor_looks_at_a_server_that_no_other_command_accepts() -> None:
    """One that may evict flows: an error it reports."""
    with Server(ENGINES[0], "--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb") as evicting:
        shell = Shell(evicting.url, "cli", FlowManager)  # type: ignore[arg-type]  # the manager is not used
        assert shell.run("stats").code == 4
        ran = shell.run("doctor")
    assert ran.code == 5
    assert re.search(r"^error +eviction +maxmemory-policy allkeys-lru, at most 100.00M$", ran.out, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
def test_what_the_doctor_says_fits_a_terminal(shell: Shell, server: Server, columns: int) -> None:
    """However long and hostile a key is; nothing of it is cut."""
    shell.make()
    flow = shell.flows.start_running(shell.make(owner="agent:" + "o" * 200))
    server.client().zincrby(keys_of(shell, flow).owner(b"agent:" + b"o" * 200), 1, str(flow.id))
    server.client().set(f"{{{shell.prefix}:0.0}}:\x1b[31m" + "k" * 200, 1)
    lines = _on_a_terminal(shell, columns, "doctor", "--quiet-after", "0s", code=5).splitlines()
    assert max(map(len, lines)) <= columns
    squeezed = "".join("".join(lines).split())
    assert "o" * 200 in squeezed
    assert "k" * 200 in squeezed
    assert "\\x1b[31m" in squeezed
    assert "quiet" in squeezed


# --- what a user can get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["show", "nonsense"], 2, "'nonsense' is not a valid UUID"),
        (
            ["show", "00000000-0000-4000-8000-000000000000"],
            3,
            "flow 00000000-0000-4000-8000-000000000000 does not exist",
        ),
        (["events", "00000000-0000-4000-8000-000000000000"], 3, "does not exist"),
        (["events", "--follow", "00000000-0000-4000-8000-000000000000"], 3, "does not exist"),
        (["cancel", "00000000-0000-4000-8000-000000000000"], 3, "does not exist"),
        (["resume", "00000000-0000-4000-8000-000000000000", "--patch", "{"], 2, "not JSON"),
        (["resume", "00000000-0000-4000-8000-000000000000", "--patch", "[" * 100_000], 2, "not JSON"),
        (["resume", "00000000-0000-4000-8000-000000000000", "--patch", '{"x": NaN}'], 2, "finite"),
        (["resume", "00000000-0000-4000-8000-000000000000", "--patch", '{"x": 1e999}'], 2, "finite"),
        (["prune", "--older-than", "soon"], 2, "'soon' is not a duration such as 30d"),
        (["prune", "--older-than", "30"], 2, "is not a duration"),
        (["prune", "--older-than", "999999999d"], 2, "reaches back too far"),
        (["prune", "--older-than", "9" * 5000 + "d"], 2, "reaches back too far"),
        (["prune"], 2, "--older-than"),
        (["doctor", "--quiet-after", "soon"], 2, "'soon' is not a duration"),
        (["list", "--status", "sleeping"], 2, "'sleeping' is not one of"),
        (["list", "--limit", "0"], 2, "--limit"),
        (["list", "--owner", ""], 2, "owner_session_key is empty"),
        (["engine", "--interval", "0"], 2, "--interval"),
        (["dance"], 2, "No such command"),
        (["demo", "/nonexistent"], 2, "does not exist"),
    ],
)
def test_a_mistake_is_told_in_a_line(shell: Shell, args: list[str], code: int, message: str) -> None:
    """No traceback, the reason on standard error, nothing on standard output."""
    ran = shell.run(*args)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_the_demo_refuses_a_server_its_processes_cannot_share(shell: Shell) -> None:
    """memory:// would be another one in each of them."""
    ran = Shell("memory://", shell.prefix, shell.flows).run("demo")
    assert ran.code == 2
    assert "memory:// is one process's own" in ran.err


@pytest.mark.parametrize("command", [["list"], ["stats", "--json"], ["engine"]])
def test_an_unreachable_server_is_told_in_a_line(command: list[str]) -> None:
    """Exit code 4, and soon."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ran = Shell(f"redis://127.0.0.1:{port}/0", "cli", FlowManager).run(*command)  # type: ignore[arg-type]  # unused
    assert ran.code == 4
    assert len(ran.err.splitlines()) == 1
    assert str(port) in ran.err


@pytest.mark.parametrize("url", ["nonsense", "http://localhost", "redis://localhost:port/0", "redis://localhost:99999"])
def test_a_bad_url_is_told_in_a_line(url: str) -> None:
    """Exit code 2."""
    ran = Shell(url, "cli", FlowManager).run("stats")  # type: ignore[arg-type]  # the manager is not used
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)


def test_a_bad_prefix_and_another_layout_are_told(shell: Shell, server: Server) -> None:
    """Exit codes 2 and 4."""
    assert Shell(shell.url, "a prefix", shell.flows).run("stats").code == 2
    server.client().hset(f"{shell.prefix}:meta", "layout", "999")
    ran = shell.run("stats")
    assert ran.code == 4
    assert "999" in ran.err


def test_a_closed_pipe_is_quiet(shell: Shell) -> None:
    """`redisflow list | head -1` says nothing on standard error."""
    for _ in range(3):
        shell.make(state={"padding": "x" * 100_000})
    reading, writing = os.pipe()
    process = shell.start("list", "--json", stdout=writing)
    os.close(writing)
    os.close(reading)
    _, err = process.communicate(timeout=MINUTE_S)
    assert (process.returncode, err) == (141, "")


def test_a_full_disk_is_told_in_a_line(shell: Shell) -> None:
    """What could not be written is an error, not a success."""
    with Path("/dev/full").open("w") as full:
        process = shell.start("stats", stdout=full)
        _, err = process.communicate(timeout=MINUTE_S)
    assert (process.returncode, err) == (4, "Error: [Errno 28] No space left on device\n")


def test_an_interrupt_is_quiet(shell: Shell) -> None:
    """Ctrl-C ends a follower with exit code 130 and no traceback."""
    flow = shell.make()
    # Where an interrupt strikes is a matter of luck. A socket it leaves to the collector is none of ours, nor is a
    # lock of coverage.py's that it leaves locked: that one would hang the process, so it runs unmeasured.
    plain = _environment(PYTHONWARNINGS="ignore", COVERAGE_PROCESS_CONFIG="", COVERAGE_PROCESS_START="")
    process = shell.start("events", "--follow", "--json", str(flow.id), env=plain)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=MINUTE_S)
    assert (process.returncode, err.strip()) == (130, "")


def test_a_damaged_flow_does_not_hide_the_others(shell: Shell, server: Server) -> None:
    """A listing goes on past stored bytes that make no sense; showing just that flow is exit code 2."""
    good, bad = shell.make(), shell.make()
    client = server.client()
    (key,) = client.keys(f"*flow:{bad.id}")
    client.hset(key, "created_at", "yesterday")
    ran = shell.run("list", "--json")
    assert [flow["id"] for flow in ran.document] == [str(good.id)]
    shown = shell.run("show", str(bad.id))
    assert shown.code == 2
    assert "created_at" in shown.err


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path, missing: str) -> None:
    """One line, exit code 2."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('no {missing}', name='{missing}')")
    environment = _environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    ran = subprocess.run(
        [sys.executable, "-m", "redisflow", "list"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr == "Error: the command line needs click and rich: pip install 'redisflow[cli]'\n"


# --- the map of errors and the help --------------------------------------------------------------------


def test_every_error_has_its_exit_code() -> None:
    """The tree of errors maps onto the documented codes."""
    flow_id = uuid4()
    assert cli.exit_code(errors.AlreadyTerminal(flow_id, FlowStatus.FAILED)) == 1
    assert cli.exit_code(errors.RevisionMismatch(flow_id, 1, 2)) == 1
    assert cli.exit_code(errors.CancelPending(flow_id)) == 1
    assert cli.exit_code(errors.IllegalTransition(flow_id, FlowStatus.CREATED, FlowStatus.FAILED)) == 1
    assert cli.exit_code(errors.FlowExists(flow_id)) == 1
    assert cli.exit_code(errors.InvalidData("odd")) == 2
    assert cli.exit_code(errors.FlowNotFound(flow_id)) == 3
    assert cli.exit_code(errors.StorageError("gone")) == 4
    assert cli.exit_code(errors.OutcomeUnknown("ab")) == 4
    assert cli.exit_code(errors.LayoutMismatch("p", "layout version", 1, 2)) == 4


def test_help_documents_every_command_and_exit_code(shell: Shell) -> None:
    """--help lists the commands, each with a sentence, and the exit codes."""
    text = shell.run("--help").out
    assert isinstance(cli.redisflow, click.Group)
    for name, command in cli.redisflow.commands.items():
        assert name in text
        assert command.get_short_help_str()
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert all(option.help for option in options), name
    for code in (0, 1, 2, 3, 4, 5, 6, 130, 141):
        assert f"  {code}  " in text


@pytest.mark.parametrize(
    ("ago", "text"),
    [
        ({"seconds": -5}, "0s"),
        ({"seconds": 59}, "59s"),
        ({"minutes": 3}, "3m"),
        ({"hours": 5}, "5h"),
        ({"days": 400}, "400d"),
    ],
)
def test_an_age_is_told_in_its_largest_unit(ago: dict[str, int], text: str) -> None:
    """A glance is enough."""
    assert render.age(datetime.now(UTC) - timedelta(**ago)) == text
