"""What `lmbridge` exports, and what importing it costs."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import lmbridge

MODULES = sorted(module.name for module in pkgutil.walk_packages(lmbridge.__path__, "lmbridge."))
LAZY = {"aiohttp_sse_client", "jsonschema", "mcp", "opentelemetry", "pytest", "rich", "typer", "xllamacpp"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_all_is_sorted_and_holds_nothing_twice() -> None:
    assert lmbridge.__all__ == sorted(set(lmbridge.__all__))


@pytest.mark.parametrize("name", lmbridge.__all__)
def test_every_name_imports(name: str) -> None:
    assert getattr(lmbridge, name) is not None


def test_all_is_what_the_root_exports() -> None:
    exported = {
        name
        for name, value in vars(lmbridge).items()
        if not isinstance(value, ModuleType) and getattr(value, "__module__", "").startswith("lmbridge.")
    }
    assert {name for name in exported if name.startswith("_")} == set()
    assert exported | set(lmbridge._LAZY) | {"__version__"} == set(lmbridge.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lmbridge' has no attribute 'LMClient'"):
        _ = lmbridge.LMClient


def test_the_root_imports_no_extra_and_nothing_that_is_not_used_yet() -> None:
    loaded = python("import sys, lmbridge; print(*sys.modules)").split()
    assert not LAZY & {name.partition(".")[0] for name in loaded}
    assert "lmbridge.local" not in loaded
    assert "lmbridge.testing" not in loaded


def test_the_local_server_is_imported_when_it_is_asked_for() -> None:
    code = "import sys; from lmbridge import LocalServer; print(LocalServer.__name__, 'xllamacpp' in sys.modules)"
    assert python(code).split() == ["LocalServer", "False"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_alone(module: str) -> None:
    python(f"import {module}")
