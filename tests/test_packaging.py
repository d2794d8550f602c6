"""The wheel: its files, its metadata, its version, and classifiers that claim only what is tested."""

from __future__ import annotations

import ast
import email
import re
import subprocess
import sys
import tomllib
from email.message import Message
from pathlib import Path
from runpy import run_path
from zipfile import ZipFile

import griffe
import pytest

import lmbridge

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline: by the hatchling of this environment, not by one that pip would download."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_the_package(names: set[str]) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lmbridge").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"lmbridge/py.typed", "lmbridge/local/smollm2_tools.jinja"} <= sources
    assert {name for name in names if name.startswith("lmbridge/")} == sources


def test_the_wheel_has_no_other_files(names: set[str]) -> None:
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"lmbridge", "_lmbridge_pytest_plugin.py", f"lmbridge-{lmbridge.__version__}.dist-info"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_tools_of_developers_are_not_published(metadata: Message) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert set(groups) == {"dev", "bench", "docs"}
    published = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", [])}
    assert published.isdisjoint(
        re.split(r"[^\w-]", line)[0] for line in (*groups["dev"], *groups["bench"], *groups["docs"])
    )


def test_the_metadata_names_the_extras(metadata: Message) -> None:
    frameworks = {"langchain", "openai-agents", "pydantic-ai"}
    assert set(metadata.get_all("Provides-Extra", [])) == {"cli", "gateway", "local", "mcp", "otel", "ray"} | frameworks
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"


def test_classifiers_claim_only_pythons_that_nox_runs_and_the_system_of_the_tests(metadata: Message) -> None:
    classifiers = metadata.get_all("Classifier", [])
    claimed = {each.rpartition(" ")[2] for each in classifiers if each.startswith("Programming Language :: Python :: ")}
    (tested,) = re.findall(
        r"^@nox\.session\(python=(\[.+\])\)\ndef tests\(", (ROOT / "noxfile.py").read_text(), re.MULTILINE
    )
    assert claimed == set(ast.literal_eval(tested))
    systems = [each for each in classifiers if each.startswith("Operating System :: ")]
    # docs/platforms.md says what is known of each.
    assert systems == ["Operating System :: MacOS", "Operating System :: POSIX :: Linux"]
    assert metadata.get_all("Project-URL") == ["Homepage, https://pypi.org/project/lmbridge/"]


def test_the_session_for_releases_tries_every_extra_and_the_workflow_every_python(metadata: Message) -> None:
    listed = (ROOT / "noxfile.py").read_text().partition("\nEXTRAS = {")[2]
    tried = re.findall(r'^    "([\w-]+)": \[', listed, re.MULTILINE)
    assert sorted(tried) == sorted(metadata.get_all("Provides-Extra", []))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    matrices = re.findall(r"^        python: \[(.+)\]$", workflow, re.MULTILINE)
    claimed = {each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier", []) if ":: 3." in each}
    assert len(matrices) == 2
    assert all(claimed <= set(re.findall(r'"([\d.]+)"', each)) for each in matrices)


def test_the_session_of_the_lowest_versions_pins_every_dependency_of_the_package_and_of_its_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("nox")
    monkeypatch.chdir(ROOT)
    session = run_path(str(ROOT / "noxfile.py"))
    pinned = dict(each.split("==") for each in session["lowest_versions"]())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for name in session["PINNED_EXTRAS"] for each in project["optional-dependencies"][name]]
    floors = re.findall(r"^([\w.-]+)>=([\w.]+)", "\n".join([*project["dependencies"], *extras]), re.MULTILINE)
    assert len(floors) == len(project["dependencies"]) + len(extras)
    assert dict(floors).items() <= pinned.items()


def test_the_default_install_needs_no_extra(metadata: Message) -> None:
    needed = {line.partition(">")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert needed == {"aiohttp", "aiohttp-sse-client", "attrs", "backoff", "cachetools", "jsonschema", "msgspec"}


def test_the_version_is_written_in_one_place(metadata: Message) -> None:
    assert metadata["Version"] == lmbridge.__version__
    assert [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "lmbridge").rglob("*.py"))
        if f'"{lmbridge.__version__}"' in path.read_text()
    ] == ["lmbridge/_version.py"]


def test_the_changelog_and_the_citation_have_the_current_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    newest = headings[0].removeprefix("## ").split(" ")[0]
    assert newest in ("[Unreleased]", f"[{lmbridge.__version__}]")
    assert f"## [{lmbridge.__version__}] - " in "\n".join(headings)
    assert f"\nversion: {lmbridge.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_install_hints_quote_the_brackets_of_extras_with_single_quotes() -> None:
    # Without quotes, zsh reads the brackets as a pattern and refuses the command.
    folders = ["lmbridge", "docs", "examples", "tests", "benchmarks"]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if "node_modules" not in path.parts]
    texts = [path for path in [*paths, *ROOT.glob("*.md")] if path.suffix in (".py", ".md", ".txt")]
    unquoted = re.compile(r"""pip install .*?(?<!')(?:\blmbridge|(?<=[ "])\.)\\?\[[a-z,]+""")
    assert all(
        unquoted.search(f"pip install {each}") for each in ("lmbridge[mcp]", "-e .[mcp]", '"lmbridge[mcp]"', '".[a,b]"')
    )
    assert not unquoted.search("pip install 'lmbridge[mcp]' '.[a]'")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts
        if path != Path(__file__)
        for match in unquoted.finditer(path.read_text())
    ]
    assert found == []


def test_changes_that_break_programs_are_noticed_and_others_are_not() -> None:
    find = run_path(str(ROOT / "scripts" / "api_changes.py"))["breaking_changes"]
    before = (
        "__all__ = ['C', 'f', 'g']\nclass C:\n def m(self, a): ...\n def _p(self): ...\ndef f(a): ...\ndef g(): ..."
    )
    after = "__all__ = ['C', 'f', 'h']\nclass C:\n def m(self, b): ...\ndef f(a, b=1): ...\ndef h(): ..."
    with (
        griffe.temporary_visited_package("sample", {"__init__.py": before}) as old,
        griffe.temporary_visited_package("sample", {"__init__.py": after}) as new,
    ):
        assert {name for name, _ in find(old, new)} == {"C.m", "g"}
