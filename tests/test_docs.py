"""The documentation is true: its examples run, its links lead somewhere, and nothing public is missing."""

from __future__ import annotations

import enum
import inspect
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import attrs
import click
import pytest

import redisflow
from redisflow import AsyncFlowManager, AsyncWaitEngine, FlowManager, WaitEngine, cli
from redisflow.settings import Settings
from redisflow.waits import Wait
from tests.support.pages import PAGES, ROOT, blocks_of, commands_of, lines_of, without_blocks
from tests.support.permissions import DOCTORS, LISTENING, exercise, permissions
from tests.support.servers import ENGINES, Engine, Server
from tests.support.waiting import wait_until

LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
EXAMPLE_ID = "6f9619ff-8b86-4d01-b42d-00c04fc964f3"  # the flow that the pages' commands are about

pytestmark = pytest.mark.skipif(not ENGINES, reason="no server is installed")


def pages_with(language: str) -> list[Path]:
    """The pages that have such blocks."""
    return [page for page in PAGES if blocks_of(page, language)]


def name_of(page: Path) -> str:
    """Its path in the repository."""
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    """One for all the pages a test process gets."""
    with Server(ENGINES[0]) as running:
        yield running


@pytest.fixture
def server(running_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty server that $REDISFLOW_URL points at."""
    running_server.client().flushall()
    monkeypatch.setenv("REDISFLOW_URL", running_server.url)
    return running_server


def make_example_flow() -> redisflow.Flow:
    """Make the flow that the pages' commands are about: it waits for an event, at revision 12."""
    with FlowManager.from_url() as flows:
        flows.delete(EXAMPLE_ID)
        flow = make_flow(flows, flow_id=EXAMPLE_ID)
        flow = flows.set_waiting(flow, redisflow.ExternalEvent("approvals", "order-1009"))
        while flow.revision < 12:
            flow = flows.update_state(flow, increment={"reminders": 1})
    return flow


def make_flow(flows: FlowManager, flow_id: str | None = None) -> redisflow.Flow:
    """Make a running flow."""
    return flows.create_mirrored(
        controller_id="billing/refunds",
        goal="refund order 1009",
        owner_session_key="agent:billing",
        requester_origin="user-77",
        state={"order": 1009, "tmp": 1},
        flow_id=flow_id,
    )


# --- examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_the_python_examples_of_a_page_run_one_after_the_other(page: Path, server: Server) -> None:
    """A reader who types them in gets what the page says. A block that is not run says why, above itself."""
    names: dict[str, Any] = {"url": server.url, "__name__": "__main__"}
    for block in blocks_of(page, "python"):
        code = compile("\n" * block.lines_above + block.text, str(page), "exec")  # so that a traceback names the line
        if block.is_run:
            exec(code, names)  # noqa: S102 - the pages are ours


def test_the_readme_example_is_short() -> None:
    """Some twenty lines say what the library is for."""
    (example,) = blocks_of(ROOT / "README.md", "python")
    assert len([line for line in example.text.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("page", pages_with("console"), ids=name_of)
@pytest.mark.usefixtures("server")
def test_the_commands_of_a_page_run(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each against the flow it names, waiting as it should be; those that do not end by themselves are only parsed."""
    monkeypatch.chdir(ROOT)
    for arguments in commands_of(page, "redisflow"):
        parse(cli.redisflow, arguments)
        if {"demo", "engine", "--follow", "--url"}.isdisjoint(arguments):
            make_example_flow()
            with monkeypatch.context() as patched:
                patched.setattr(warnings, "showwarning", warnings.showwarning)  # which a run of the command replaces
                code = cli.run(arguments)
            printed = capsys.readouterr()
            assert code == 0, f"redisflow {shlex.join(arguments)}: {printed.err}"
            assert printed.out


def parse(group: click.Group, arguments: list[str]) -> None:
    """Parse a command line as far as its last option."""
    with suppress(click.exceptions.Exit), group.make_context("redisflow", list(arguments)) as context:  # by --help
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        command.make_context(name, rest, parent=context).close()


@pytest.mark.parametrize("page", pages_with("console"), ids=name_of)
def test_a_shell_takes_the_commands_of_a_page_as_they_are_meant(page: Path) -> None:
    """What is a pipe, a subshell or the like to it is quoted."""
    for line in lines_of(page):
        unquoted = shlex.shlex(line, posix=True, punctuation_chars=True)
        unquoted.commenters = ""
        assert not [word for word in unquoted if set(word) <= set("();<>|&")], line


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page, "redis-cli")], ids=name_of)
def test_the_redis_cli_commands_of_a_page_find_something(page: Path, server: Server) -> None:
    """The keys they name are those of a real flow."""
    flow = make_example_flow()
    with FlowManager.from_url() as flows:
        neighbour = make_flow(flows, flow_id=EXAMPLE_ID.replace("6f", "7f", 1))
        flows.set_waiting(neighbour, redisflow.Manual(deadline=flow.created_at))
    commands = [words for words in commands_of(page, "redis-cli") if words[0] != "-p"]  # for a Sentinel
    for words in commands:
        assert ask(server, *words), shlex.join(words)


def ask(server: Server, *words: str) -> Any:
    """Send a command as the administrator."""
    return server.client().execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's


# --- permissions -----------------------------------------------------------------------------------------


def exercise_at(url: str) -> None:
    """Do everything the library does."""
    with FlowManager.from_url(url, deadline_s=2) as flows:
        exercise(flows, WaitEngine(flows))


def as_user(server: Server, rule: list[str]) -> str:
    """Empty the server, make the user `flows` with just that rule; return the URL for it."""
    ask(server, "FLUSHALL")
    ask(server, "SCRIPT", "FLUSH")
    ask(server, "ACL", "SETUSER", "flows", "reset", *rule)
    return f"redis://flows:secret@127.0.0.1:{server.port}/0"


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_doctor_says_which_permission_it_lacks_and_has_none_to_spare(engine: Engine) -> None:
    """It looks at everything with those in docs/backends.md, and goes on without any of its own."""
    rule = permissions()
    assert set(rule) >= DOCTORS
    with Server(engine) as server:
        for part in [None, "+config|get", *sorted(DOCTORS)]:
            with FlowManager.from_url(as_user(server, [other for other in rule if other != part])) as flows:
                make_flow(flows)
                lacking = [finding for finding in flows.doctor().findings if finding.kind == "unavailable"]
            said = [] if part is None else [part[1:].replace("|", " ").upper()]
            assert [finding.what.rpartition("may not run ")[2] for finding in lacking] == said


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_documented_user_may_do_everything_and_has_nothing_to_spare(engine: Engine) -> None:
    """The library works with the permissions in docs/backends.md, and misses any that is taken away."""
    rule = permissions()
    with Server(engine) as server:
        url = as_user(server, rule)
        exercise_at(url)
        with pytest.raises(redisflow.StorageError, match="lacks a permission"):
            FlowManager.from_url(url, prefix="other").connect()
        optional = {"+config|get", *LISTENING, *DOCTORS}
        exercise_at(as_user(server, [part for part in rule if part not in optional]))
        for part in rule:
            if part.startswith(("~", "+")) and part not in optional:
                url = as_user(server, [other for other in rule if other != part])
                with pytest.raises(redisflow.StorageError):
                    exercise_at(url)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("missing", [None, *LISTENING])
def test_an_engine_needs_a_channel_to_be_told(
    engine: Engine, missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The documented user has it; one who may not listen is warned once, and looks when the interval is over."""
    with Server(engine) as server:
        url = as_user(server, [part for part in permissions() if part != missing])
        stop = Event()
        with FlowManager.from_url(url) as flows:
            running = Thread(target=WaitEngine(flows).run, args=(0.05 if missing else 3600, stop))
            running.start()
            try:
                if missing in {None, "+publish"}:
                    channel = flows.namespace.keyspace.partitions[0].due.decode()
                    wait_until(lambda: ask(server, "PUBSUB", "NUMSUB", channel)[1], description="the engine listens")
                else:
                    wait_until(lambda: caplog.messages, description="the engine is refused")
                for _ in range(3):
                    flow = flows.set_waiting(make_flow(flows), redisflow.Timer(datetime.now(UTC)))
                    flows.wait_for(flow, "running", timeout=10)
            finally:
                stop.set()
                running.join(10)
        refusals = [message for message in caplog.messages if "not told of new timers" in message]
        assert len(refusals) == (missing not in {None, "+publish"})


# --- links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings linked to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{target} is no file"
        assert not anchor or anchor in anchors_of(linked), f"{target} is no heading of {linked.name}"


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_readme() -> None:
    """No page is left behind."""
    reached, to_read = set(), [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page not in reached:
            reached.add(page)
            targets = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
            to_read += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert set(PAGES) <= reached


# --- completeness ----------------------------------------------------------------------------------------

REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
CLI_PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
CODE_SPANS = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(ROOT / "docs/reference.md"))}


@pytest.mark.parametrize("name", redisflow.__all__)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    """With each of its attributes, errors included."""
    assert any(span == name or span.startswith(f"{name}(") for span in CODE_SPANS)
    kind = getattr(redisflow, name)
    if issubclass(kind, redisflow.FlowError):
        listed = re.search(rf"^[│├└─ ]*{name}\b *(.*)$", REFERENCE, re.MULTILINE)
        own = [] if "__init__" not in vars(kind) else list(inspect.signature(kind).parameters)
        assert listed is not None
        assert [fact for fact in listed[1].split(", ") if fact] == [fact for fact in own if has_fact(kind, fact)]
    elif issubclass(kind, enum.Enum):
        assert {member.value for member in kind} <= CODE_SPANS
    elif attrs.has(kind):
        words = {word for span in CODE_SPANS for word in re.findall(r"\w+", span)}
        assert {field.name for field in attrs.fields(kind) if not field.name.startswith("_")} <= words


def has_fact(kind: type, parameter: str) -> bool:
    """Whether the error keeps the argument as an attribute; OutcomeUnknown's `reason` is only text."""
    return f"self.{parameter} = " in inspect.getsource(kind)


def methods_of(kind: type) -> list[str]:
    """Its public methods."""
    return [name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind.__name__}.{name}")
        for kind in (FlowManager, AsyncFlowManager, WaitEngine, AsyncWaitEngine)
        for name in methods_of(kind)
    ],
)
def test_a_method_is_in_the_reference_with_its_signature(kind: type, name: str) -> None:
    """Arguments, their order and their defaults are those of the code."""
    signature = inspect.signature(getattr(kind, name))
    named = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in named]
    shown = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    shown = re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", shown)
    assert f"{name}{shown}" in CODE_SPANS


@pytest.mark.parametrize("kind", [redisflow.FlowStatus, Wait, redisflow.Timer], ids=lambda kind: kind.__name__)
def test_what_a_value_can_do_is_in_the_reference(kind: type) -> None:
    """Its public methods and properties."""
    inherited = set(dir(str)) | {field.name for field in (attrs.fields(kind) if attrs.has(kind) else ())}
    names = {name for name in vars(kind) if name[0] not in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"} - inherited
    assert names <= {span.partition("(")[0] for span in CODE_SPANS}


def test_every_option_of_a_manager_is_in_the_reference_with_its_default() -> None:
    """As a row of the table of options."""
    rows = dict(re.findall(r"^\| `(\w+)` \| `?\"?([^|\"`]*?)\"?`? \|", REFERENCE, re.MULTILINE))
    defaults = {field.name: str(field.default) for field in attrs.fields(Settings)}
    assert {name: rows.get(name, "").replace(",", "") for name in defaults} == defaults


def test_every_command_and_option_is_on_the_page_about_the_command_line() -> None:
    """A command has a section, and its options are named in it."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", CLI_PAGE, re.MULTILINE | re.DOTALL))
    assert cli.redisflow.commands.keys() <= sections.keys()
    documented = [(CLI_PAGE, cli.redisflow), *((sections[name], each) for name, each in cli.redisflow.commands.items())]
    for text, command in documented:
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{command.name} {option}"


def test_every_exit_code_is_on_the_page_about_the_command_line() -> None:
    """With the words the command itself has for it."""
    epilog = re.findall(r"^ *(\d+)  (.+)$", cli.redisflow.epilog or "", re.MULTILINE)
    assert epilog
    for code, meaning in epilog:
        assert f"| {code} | {meaning} |" in CLI_PAGE
