"""A little of what `make fuzz` does for longer: the same targets, by hypothesis everywhere, by atheris where it is."""

from __future__ import annotations

import logging
from datetime import timedelta
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import NEEDS, fuzz
from tests.fuzz.targets import TARGETS

SEED = 1


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_the_bytes_nothing_breaks(target: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused in the library's own words, or read back equal; by hypothesis, which finds the smallest that is not."""
    caplog.set_level(logging.CRITICAL + 1)

    @settings(max_examples=400, deadline=timedelta(seconds=5), derandomize=True, database=None)
    @given(st.binary(max_size=400))
    def run(source: bytes) -> None:
        TARGETS[target](source)

    run()


@pytest.mark.skipif(find_spec("atheris") is None, reason=NEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_coverage_guides_to_nothing_that_breaks(target: str) -> None:
    """The same by atheris, which goes on from what reached something new."""
    ran = fuzz(target, 1500, SEED)
    assert ran.trouble == ""
    assert ran.inputs >= 1500
    assert ran.corpus > 20
