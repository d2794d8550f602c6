"""The commands `lmbridge` and `python -m lmbridge` (extra `cli`)."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, and ends the process with its exit status."""
    try:
        from lmbridge.cli.application import main as run  # noqa: PLC0415 - the extra may be missing
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "prompt_toolkit"):
            raise
        sys.exit(f"lmbridge: the command line needs {error.name}: pip install 'lmbridge[cli]'")
    except KeyboardInterrupt:
        # Ctrl-C while the modules are imported. The status is that of `ExitStatus.INTERRUPTED`.
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
