"""The names that `lmbridge` exports, the modules that importing it loads, and the signatures of clients."""

from __future__ import annotations

import inspect
import os
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import lmbridge
import lmbridge.types
from lmbridge.client.llm import ClientOptions

MODULES = sorted(module.name for module in pkgutil.walk_packages(lmbridge.__path__, "lmbridge."))
LAZY = {"aiohttp_sse_client", "jsonschema", "mcp", "opentelemetry", "pytest", "ray", "rich", "typer", "xllamacpp"} | {
    "agents",
    "httpx2",
    "langchain_core",
    "openai",
    "pydantic_ai",
}


# Imports the modules that it is called with, each in a process of its own, and prints the tracebacks. What `import
# lmbridge` loads is loaded before each of them in any case, so it is loaded once, as are the libraries of others that
# many modules import.
_IMPORT_EACH_ALONE = """
import contextlib, os, sys, traceback
for library in ("openai", "prompt_toolkit", "rich", "typer"):
    with contextlib.suppress(ImportError):
        __import__(library)
import lmbridge
for module in sys.argv[1:]:
    if module in sys.modules:
        continue
    if not (child := os.fork()):
        try:
            __import__(module)
        except BaseException:
            print(module, traceback.format_exc(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def python(code: str, *arguments: str) -> str:
    """Returns what a new interpreter prints."""
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_all_is_sorted_and_has_no_duplicates() -> None:
    assert lmbridge.__all__ == sorted(set(lmbridge.__all__))


@pytest.mark.parametrize("name", lmbridge.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(lmbridge, name) is not None


def test_all_lists_exactly_what_the_root_exports() -> None:
    exported = {
        name
        for name, value in vars(lmbridge).items()
        if not isinstance(value, ModuleType) and getattr(value, "__module__", "").startswith("lmbridge.")
    }
    assert {name for name in exported if name.startswith("_")} == set()
    assert exported | set(lmbridge._LAZY) | {"__version__"} == set(lmbridge.__all__)


def test_the_types_of_requests_and_replies_have_names_of_their_own() -> None:
    assert set(lmbridge.types.__all__).isdisjoint(lmbridge.__all__)


def test_an_unknown_name_raises_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lmbridge' has no attribute 'LMClient'"):
        _ = lmbridge.LMClient


def test_the_root_imports_no_extra_and_no_module_before_its_first_use() -> None:
    loaded = python("import sys, lmbridge; print(*sys.modules)").split()
    assert not LAZY & {name.partition(".")[0] for name in loaded}
    assert "lmbridge.local" not in loaded
    assert "lmbridge.testing" not in loaded


def test_importing_the_local_server_does_not_load_llama_cpp() -> None:
    code = "import sys; from lmbridge import LocalServer; print(LocalServer.__name__, 'xllamacpp' in sys.modules)"
    assert python(code).split() == ["LocalServer", "False"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_every_module_can_be_imported_alone() -> None:
    failed = python(_IMPORT_EACH_ALONE, *MODULES)
    assert failed == ""


def test_the_options_of_a_pool_are_those_of_a_client() -> None:
    options = list(inspect.signature(lmbridge.LLMClient).parameters)
    assert list(ClientOptions.__annotations__) == options


def test_an_unknown_option_of_a_pool_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_retrys"):
        lmbridge.LLMClientPool(max_retrys=1)  # type: ignore[call-arg]  # misspelled
