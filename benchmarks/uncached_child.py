"""The child process of a `LocalServer` that keeps only the conversations which its slots have processed last."""

from __future__ import annotations

from typing import Any

from lmbridge.local import child

# Users have no need for this option, so `LocalServer` does not have it.
_make_params = child._params  # noqa: SLF001 - the program of the same server


def _params(params: Any, options: dict[str, Any]) -> Any:
    made = _make_params(params, options)
    made.cache_ram_mib = 0
    return made


if __name__ == "__main__":
    child._params = _params  # noqa: SLF001 - as above
    child.main()
