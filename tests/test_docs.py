"""Every Python block in the README and in docs/ runs and prints what the page shows; links and commands work.

The blocks of a page run in order, in one namespace, against a scripted server whose URL is in the environment. An HTML
comment on the line before a block changes that:

- `<!-- before: CODE -->`: the code runs first, to prepare the scripted server; it can use `server` and the names of
  `lmbridge.testing`, and `second_server`, whose URL is in `SECOND_API_BASE`.
- `<!-- program -->`: the block is a complete program and runs in a separate interpreter.
- `<!-- collector -->`: the block is a program that also sends spans and metrics to a collector, in whose place the test
  has a scripted server. It runs if the exporter is installed.
- `<!-- file: NAME -->`: the block is a file for pytest, which runs once all files of the page have been written.
- `<!-- real -->`: the block uses the embedded server and runs in a separate test.
- `<!-- peer -->`: the block is for another library. It is only compiled; `nox -s migrations` checks its types.

A `text` block directly after a Python block is its expected output. Ports and seconds are not compared.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import sys
import tomllib
from collections.abc import AsyncIterator, Sequence
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

import lmbridge
from lmbridge import LLMClient, testing
from lmbridge.testing import ScriptedServer
from lmbridge.testing.completions import completion_chunk

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# The modules from which users import; `lmbridge.errors` and others are where names of the root are defined.
PUBLIC_MODULES = [
    "lmbridge",
    "lmbridge.fleet",
    "lmbridge.gateway",
    "lmbridge.interop.langchain",
    "lmbridge.interop.openai",
    "lmbridge.interop.openai_agents",
    "lmbridge.interop.pydantic_ai",
    "lmbridge.mcp",
    "lmbridge.observe",
    "lmbridge.sync",
    "lmbridge.testing",
    "lmbridge.types",
]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>\w+)(?:: (?P<value>[^\n]+))? -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    mark: str | None
    value: str
    language: str
    code: str
    output: str | None
    line: int


def blocks(page: Path, *marks: str | None) -> list[Block]:
    """Returns the Python blocks of a page that have one of these marks; None stands for blocks without a mark."""
    return [block for block in all_blocks(page) if block.language == "python" and block.mark in marks]


def all_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            found["mark"],
            found["value"] or "",
            found["language"],
            found["code"],
            found["output"],
            text.count("\n", 0, found.start("code")) + 1,
        )
        for found in BLOCK.finditer(text)
    ]


def as_parameter(page: Path, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    name = page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()
    return pytest.param(page, id=name, marks=marks)


def pages(*marks: str | None) -> list[Any]:
    # Importing the frameworks of that page takes seconds.
    slow = {"interop.md": [pytest.mark.slow, pytest.mark.timeout(180)]}
    return [as_parameter(page, slow.get(page.name, ())) for page in PAGES if blocks(page, *marks)]


async def execute(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    """Runs a block, which may use `await` outside of functions."""
    # The added lines make a traceback show the line numbers of the page.
    source = "\n" * (block.line - 1) + block.code
    code = compile(source, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    outcome = eval(code, namespace)
    if inspect.isawaitable(outcome):
        await outcome


def check_output(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr().out
    if block.output is not None:
        assert comparable(printed) == comparable(block.output)


def comparable(text: str) -> str:
    """Replaces the ports and seconds of a text, which differ from run to run."""
    return re.sub(r"\d+\.\d\d s", "0.00 s", re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:0", text))


async def close_clients(namespace: dict[str, Any]) -> None:
    for value in namespace.values():
        if isinstance(value, LLMClient):
            await value.close()


def chunk(text: str) -> dict[str, Any]:
    return completion_chunk("chatcmpl-1", "qwen3-4b", {"content": text})


@pytest_asyncio.fixture
async def second_server() -> AsyncIterator[ScriptedServer]:
    """Another server, for pages about several of them."""
    async with ScriptedServer() as server:
        yield server


@pytest.fixture
def namespace() -> dict[str, Any]:
    """The namespace that the blocks of a page share."""
    return {"__name__": "__main__"}


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("page", pages(None, "before"))
async def test_the_blocks_of_a_page_run(
    page: Path,
    namespace: dict[str, Any],
    scripted_server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    second_server: ScriptedServer,
    tmp_path: Path,
) -> None:
    # A block may write files.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    monkeypatch.setenv("SECOND_API_BASE", second_server.api_base)
    monkeypatch.setenv("DEFAULT_MODEL", "test-model")
    prepare_names = {name: getattr(testing, name) for name in testing.__all__} | {
        "server": scripted_server,
        "second_server": second_server,
        "chunk": chunk,
    }
    try:
        for block in blocks(page, None, "before"):
            exec(block.value, prepare_names.copy())
            await execute(block, page, namespace)
            check_output(block, capsys)
    finally:
        await close_clients(namespace)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", pages("real"))
async def test_the_blocks_of_a_page_run_on_the_embedded_server(
    page: Path, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        for block in blocks(page, "real"):
            await execute(block, page, namespace)
            check_output(block, capsys)
    finally:
        await close_clients(namespace)


@pytest.mark.parametrize("page", pages("peer"))
def test_the_code_for_other_libraries_can_be_compiled(page: Path) -> None:
    for block in blocks(page, "peer"):
        compile(block.code, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("page", pages("program"))
async def test_the_programs_of_a_page_run(page: Path, scripted_server: ScriptedServer) -> None:
    env = os.environ | {"LMBRIDGE_API_BASE": scripted_server.api_base, "DEFAULT_MODEL": "test-model"}
    for block in blocks(page, "program"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", block.code, env=env, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
        assert process.returncode == 0
        assert printed.decode().removesuffix("\n") == "Hello from the scripted server."


@pytest.mark.parametrize("page", pages("collector"))
async def test_a_program_of_a_page_sends_its_spans_and_metrics_to_a_collector(
    page: Path, scripted_server: ScriptedServer, second_server: ScriptedServer
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs opentelemetry-exporter-otlp-proto-http")
    proto = "opentelemetry.proto.collector.{0}.v1.{0}_service_pb2"
    for path in ("/v1/traces", "/v1/metrics"):
        second_server.on_path(path, testing.reply(200, {}))
    env = os.environ | {
        "LMBRIDGE_API_BASE": scripted_server.api_base,
        "DEFAULT_MODEL": "test-model",
        "OTEL_EXPORTER_OTLP_ENDPOINT": second_server.origin,
    }
    for block in blocks(page, "collector"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", block.code, env=env, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
        assert (process.returncode, printed) == (0, b"Hello from the scripted server.\n")
        sent = {request.path: request.body for request in second_server.requests}
        traces = import_module(proto.format("trace")).ExportTraceServiceRequest.FromString(sent["/v1/traces"])
        spans = [span.name for each in traces.resource_spans for scope in each.scope_spans for span in scope.spans]
        assert spans == ["chat test-model", "invoke_agent"]
        metrics = import_module(proto.format("metrics")).ExportMetricsServiceRequest.FromString(sent["/v1/metrics"])
        names = {
            metric.name for each in metrics.resource_metrics for scope in each.scope_metrics for metric in scope.metrics
        }
        assert "gen_ai.client.inference.duration" in names
        second_server.requests.clear()


# It starts pytest in a process of its own, which takes a while on a busy machine.
@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", pages("file"))
def test_the_files_of_a_page_run_in_pytest(page: Path, pytester: pytest.Pytester) -> None:
    files = blocks(page, "file")
    for block in files:
        (pytester.path / block.value).write_text(block.code)
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error"
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=sum(block.code.count("def test_") for block in files))


def test_every_code_block_has_a_known_language_and_mark() -> None:
    for page in PAGES:
        found = all_blocks(page)
        assert {block.mark for block in found} <= {None, "before", "program", "collector", "file", "real", "peer"}, (
            page.name
        )
        assert {block.language for block in found} <= {"python", "shell", "text"}, page.name
        outputs = sum(block.output is not None for block in found)
        assert page.read_text().count("```") == 2 * (len(found) + outputs), page.name


def test_the_readme_begins_with_the_purpose_and_the_two_commands() -> None:
    title, purpose, commands = (ROOT / "README.md").read_text().split("\n\n")[:3]
    assert title == "# lmbridge"
    assert purpose.startswith("lmbridge is ")
    assert commands.startswith("```shell\nmake demo")
    blocks_of_readme = all_blocks(ROOT / "README.md")
    first = blocks_of_readme[0]
    assert [line.split("#")[0].split() for line in first.code.splitlines()] == [["make", "demo"], ["make", "test"]]
    assert any("examples/quickstart.py" in block.code for block in blocks_of_readme if block.language == "shell")


@pytest.mark.parametrize("page", [as_parameter(page) for page in PAGES])
def test_commands_name_existing_targets_extras_groups_sessions_and_files(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = set(project["project"]["optional-dependencies"]), set(project["dependency-groups"])
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for block in all_blocks(page):
        if block.language == "shell":
            assert set(re.findall(r"^make (?:\w+=\S+ )?([\w-]+)", block.code, re.MULTILINE)) <= targets
            assert {name for names in re.findall(r"\[([\w,-]+)\]", block.code) for name in names.split(",")} <= extras
            assert set(re.findall(r"--group (\w+)", block.code)) <= groups
            assert set(re.findall(r"nox -s (\w+)", block.code)) <= sessions
            assert all((ROOT / path).is_file() for path in re.findall(r"\b(?:examples|tests)/\S+\.py", block.code))


@pytest.mark.parametrize("page", [as_parameter(page) for page in (*PAGES, ROOT / "CHANGELOG.md")])
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_architecture_page_names_code_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \| (`[^|]+`) \|$", text, re.MULTILINE)
    assert len(rows) == text.count("\n| ") - 2 * text.count("\n| promise |")
    for _promise, code, tests in rows:
        for folder, paths in (("lmbridge", code), ("tests", tests)):
            missing = [path for path in re.findall(r"`([^`]+)`", paths) if not (ROOT / folder / path).is_file()]
            assert missing == [], f"docs/architecture.md names files that do not exist in {folder}/"
    for path in re.findall(r"`([\w/]+\.py)`", text.partition("## Promises")[0]):
        assert (ROOT / path).is_file() or (ROOT / "lmbridge" / path).is_file(), path


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS))


def test_every_exported_name_occurs_in_the_documentation() -> None:
    spans = re.findall(r"`([^`\n]+)`", "".join(page.read_text() for page in PAGES if page.parent == DOCS))
    words = {word for span in spans for word in re.findall(r"\w+", span)}
    assert set(lmbridge.__all__) - words == set()


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_the_reference_has_every_public_name_once(module: str) -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", text, re.MULTILINE)
    try:
        names = set(import_module(module).__all__) - {"__version__"}
    except ImportError as error:
        pytest.skip(str(error))
    if module != "lmbridge":
        names -= set(lmbridge.__all__) if module != "lmbridge.sync" else set()
    assert sorted(listed) == sorted(names)


def test_the_readme_has_the_commands_of_make_test() -> None:
    readme, makefile = ((DOCS.parent / name).read_text() for name in ("README.md", "Makefile"))
    without_make = readme.partition("## Without make")[2]
    commands = re.findall(r"^\t\.venv-test/bin/((?:ruff|mypy|pyright|python scripts/).*)$", makefile, re.MULTILINE)
    extras = re.search(r"^\.venv-test/installed: EXTRAS := (\S+)$", makefile, re.MULTILINE)
    assert extras is not None
    assert len(commands) == 5
    missing = [each for each in (*commands, f"'.[{extras[1]}]'") if each not in without_make]
    assert not missing


def test_the_reference_names_only_what_exists() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, name = path.rpartition(".")
            assert hasattr(import_module(module), name), f"{page.name}: {path}"


def test_the_site_has_the_texts_of_all_pages_for_programs(tmp_path: Path) -> None:
    run_path(str(ROOT / "scripts" / "site_text.py"))["write_texts"](tmp_path)
    index = (tmp_path / "llms.txt").read_text()
    linked = re.findall(r"\]\((\S+?)\)", index)
    assert len(linked) == len([page for page in PAGES if page.is_relative_to(DOCS)])
    # What is generated from docstrings is only on the site.
    assert all((tmp_path / path).is_file() for path in linked if not re.match(r"reference/\w+/$", path))
    whole = (tmp_path / "llms-full.txt").read_text()
    assert "\n# Why streams break\n" in whole
    assert "<!-- before:" not in whole
