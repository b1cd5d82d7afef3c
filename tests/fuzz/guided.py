"""`python -m tests.fuzz.guided TARGET RUNS SEED FOLDER`: one target under atheris; prints its figures as JSON."""

from __future__ import annotations

import atexit
import json
import logging
import signal
import sys
import time

import atheris

with atheris.instrument_imports(include=["redisflow"]):
    from tests.fuzz.targets import TARGETS

_HANGS_AFTER_S = 10
_MAX_BYTES = 512


def main(name: str, runs: str, seed: str, folder: str) -> None:
    """Fuzz, and leave what is found in the folder. Does not return."""
    target, inputs, slowest_s, since_s = TARGETS[name], 0, 0.0, time.process_time()

    @atheris.instrument_func  # type: ignore[untyped-decorator]  # it has no annotations
    def one_input(source: bytes) -> None:
        nonlocal inputs, slowest_s
        begun_s = time.process_time()
        target(source)
        inputs, slowest_s = inputs + 1, max(slowest_s, time.process_time() - begun_s)

    def tell() -> None:
        # The alarm that tells of hangs must not ring while the interpreter ends: nobody handles it any more.
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"inputs": inputs, "seconds": time.process_time() - since_s, "slowest_s": slowest_s}))

    logging.disable(logging.CRITICAL)
    atexit.register(tell)
    limits = [f"-atheris_runs={runs}", f"-timeout={_HANGS_AFTER_S}", f"-max_len={_MAX_BYTES}", "-rss_limit_mb=2048"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-seed={seed}", "-len_control=10", f"-artifact_prefix={folder}/{name}-"], one_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
