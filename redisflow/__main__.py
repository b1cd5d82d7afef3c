"""The command `redisflow`, and `python -m redisflow`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from redisflow.cli import run  # noqa: PLC0415 - what it needs is an extra
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in {"click", "rich"}:
            raise
        print("Error: the command line needs click and rich: pip install 'redisflow[cli]'", file=sys.stderr)  # noqa: T201 - click is what is missing
        sys.exit(2)
    sys.exit(run())


if __name__ == "__main__":
    main()
