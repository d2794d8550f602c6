"""Which module may import which: the contracts in pyproject.toml, and rules that import-linter cannot express."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "lmbridge").rglob("*.py"))


@functools.cache
def imports(source: Path) -> list[str]:
    """Returns the full name of each module that a file imports from, at its top or inside a function."""
    package = source.relative_to(ROOT).parent.parts
    names: list[str] = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names.append(".".join((*above, *filter(None, [node.module]))))
    return names


def importers(name: str) -> list[str]:
    """Returns the files of the package that import a module or anything below it."""
    return [
        source.relative_to(ROOT).as_posix()
        for source in SOURCES
        if any(module == name or module.startswith(f"{name}.") for module in imports(source))
    ]


def test_the_contracts_are_kept() -> None:
    # import-linter runs in a separate process because it disables all existing loggers.
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        # Its client and its server.
        ("aiohttp", ["lmbridge/gateway/http_server.py", "lmbridge/transport/session.py"]),
        ("backoff", ["lmbridge/transport/retry.py"]),
        ("cachetools", ["lmbridge/client/model_validator.py"]),
        ("agents", ["lmbridge/interop/openai_agents.py"]),
        ("httpx2", ["lmbridge/interop/openai.py"]),
        ("jsonschema", ["lmbridge/agent/argument_checks.py"]),
        ("langchain_core", ["lmbridge/interop/langchain.py"]),
        ("openai", ["lmbridge/interop/openai.py", "lmbridge/interop/pydantic_ai.py"]),
        ("opentelemetry", ["lmbridge/observe/otel.py"]),
        ("prometheus_client", ["lmbridge/gateway/metrics.py"]),
        ("pydantic_ai", ["lmbridge/interop/pydantic_ai.py"]),
        ("ray", ["lmbridge/fleet/ray_backend.py"]),
        ("uvicorn", ["lmbridge/mcp/sdk/http_service.py"]),
    ],
)
def test_only_one_file_of_a_layer_imports_the_library(library: str, expected: list[str]) -> None:
    assert importers(library) == expected


def test_only_one_folder_imports_the_mcp_sdk() -> None:
    assert {Path(importer).parent.as_posix() for importer in importers("mcp")} == {"lmbridge/mcp/sdk"}


@pytest.mark.parametrize("library", ["prompt_toolkit", "rich", "typer"])
def test_only_the_command_line_imports_the_library(library: str) -> None:
    # The progress bar of fleets is for the terminal as well.
    others = [importer for importer in importers(library) if importer != "lmbridge/fleet/progress_bar.py"]
    assert {Path(importer).parent.as_posix() for importer in others} == {"lmbridge/cli"}


@pytest.mark.parametrize("library", ["aioresponses", "pytest", "requests"])
def test_no_file_imports_the_library(library: str) -> None:
    assert importers(library) == []


def test_no_module_of_the_package_imports_the_root() -> None:
    assert [source.as_posix() for source in SOURCES if "lmbridge" in imports(source)] == []
