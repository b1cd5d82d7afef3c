"""The protocol keeps its promise in thousands of schedules, and the simulation finds each fault of older protocols."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.protocol import themes
from tests.protocol.exploring import first_found, story_of
from tests.protocol.old_rules import OLD_RULES, OldRule

_PORTIONS, _IN_PORTION = 8, 2_500


@pytest.mark.parametrize("portion", range(_PORTIONS))
def test_every_schedule_keeps_the_promise(portion: int) -> None:
    """What the callers were told is what the server did, and it did nothing twice."""
    found = first_found(range(portion * _IN_PORTION, (portion + 1) * _IN_PORTION))
    assert found is None, story_of(found.seed)


@pytest.mark.parametrize("rule", OLD_RULES, ids=lambda rule: rule.name.replace(" ", "-"))
def test_the_fault_of_an_old_rule_is_found(rule: OldRule) -> None:
    """A simulation that finds nothing proves nothing, unless it would have found what is wrong."""
    with rule.library():
        found = first_found(range(rule.within), rule.server, rule.theme, shows=rule.is_shown_by)
    assert found is not None


def test_a_schedule_is_repeated_by_its_seed() -> None:
    """The same packets, at the same times."""
    for seed in range(20):
        assert story_of(seed) == story_of(seed)


def test_the_themes_meet_with_what_they_are_about() -> None:
    """No theme is so narrow that its calls come to nothing."""
    for theme in themes.THEMES:
        assert "done" in "".join(story_of(seed, theme=theme) for seed in range(5))


def test_the_command_line_tells_a_story_and_counts() -> None:
    """`--schedule` tells of one, `--schedules` of many; both say whether something was wrong."""
    command = [sys.executable, "-m", "tests.protocol"]
    one = subprocess.run([*command, "--schedule", "7"], capture_output=True, text=True, check=True)
    assert one.stdout.endswith("nothing is wrong\n")
    many = subprocess.run([*command, "--schedules", "200", "--seed", "1"], capture_output=True, text=True, check=True)
    assert "200 schedules in " in many.stdout
    assert many.stdout.endswith("; nothing wrong\n")
