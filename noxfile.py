"""Sessions that need a separate environment: other Pythons, older libraries, the documentation as a site."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "aioresponses", "mcp1", "mcp2"]

PROJECT = nox.project.load_toml("pyproject.toml")
DEV = nox.project.dependency_groups(PROJECT, "dev")
PYTEST = ["pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"]
DOCS = nox.project.dependency_groups(PROJECT, "docs")

SDK_1 = "mcp<2"
# SDK 1.x leaves streams of its HTTP sessions to the garbage collector, which would warn in the middle of another test.
SDK_1_WARNING = "ignore:Unclosed <MemoryObject:ResourceWarning"


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install("-e", ".[cli,gateway,langchain,local,mcp,openai-agents,pydantic-ai,ray]", *DEV)
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)


# The extras whose libraries `oldest` also pins. The others have more dependencies than this session tests.
PINNED_EXTRAS = ("cli", "gateway", "mcp", "otel")


def lowest_versions() -> list[str]:
    """Returns the lowest allowed version of each dependency of the package, as pyproject.toml states it."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for name in PINNED_EXTRAS for each in extras[name])]
    # A newer opentelemetry-sdk would need a newer opentelemetry-api than the lowest one.
    requirements += [each for each in DEV if each.startswith("opentelemetry-sdk")]
    floors = [re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:,.*)?", each) for each in requirements]
    return [f"{floor[1]}=={floor[2]}" for floor in floors if floor is not None]


# `make test-slow` runs this session, too, because the tests of the session depend on what the libraries do.
@nox.session(reuse_venv=True)
def oldest(session: nox.Session) -> None:
    session.install("-e", f".[{','.join(PINNED_EXTRAS)}]", *lowest_versions(), "blockbuster", "hypothesis", *PYTEST)
    command = ["python", "-m", "pytest", "-n", "auto", "-m", "not slow and not real"]
    # Old libraries use what other libraries have since deprecated, and the plugin of an old anyio breaks pytest.
    command += ["-W", "ignore::DeprecationWarning", "-W", SDK_1_WARNING, "-p", "no:anyio"]
    folders = ["tests/transport", "tests/client", "tests/agent", "tests/observe", "tests/mcp/sdk", "tests/mcp/servers"]
    session.run(*command, *(session.posargs or folders))
    # Where aiohttp has no compiled parser, it uses one in Python, which does not always behave the same.
    session.run(*command, *(session.posargs or ["tests/transport"]), env={"AIOHTTP_NO_EXTENSIONS": "1"})


# The newest versions of all dependencies, even those released since a lock file or an image was last changed.
@nox.session
def newest(session: nox.Session) -> None:
    extras = "cli,gateway,langchain,mcp,openai-agents,otel,pydantic-ai"
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", f".[{extras}]", *DEV)
    session.run("python", "-m", "pytest", "-n", "auto", "-m", "not slow and not real", *session.posargs)


# It needs the database of known vulnerabilities at pypi.org, and fails if a package cannot be looked up there.
@nox.session
def audit(session: nox.Session) -> None:
    session.install("pip-audit", "-e", ".[cli,gateway,local,mcp,otel]")
    session.run("pip-audit", "--strict", "--skip-editable")


# `make test-slow` runs this session, so it uses the current Python and installs only what its tests need.
@nox.session(reuse_venv=True)
def aioresponses(session: nox.Session) -> None:
    packages = [
        "aioresponses",
        "blockbuster",
        "hypothesis",
        "pytest",
        "pytest-asyncio",
        "pytest-timeout",
        "pytest-xdist",
    ]
    session.install("-e", ".", "aiohttp<3.14", *packages)
    session.run("python", "-m", "pytest", "tests/aioresponses", *session.posargs)


# `make test-slow` also runs this one. `make test` covers SDK 2.x, which is installed in its environment.
@nox.session(reuse_venv=True)
def mcp1(session: nox.Session) -> None:
    _mcp(session, SDK_1)


# `make test-slow` runs this session. It installs clients of other projects, which only tests of the gateway need.
@nox.session(reuse_venv=True)
def clients(session: nox.Session) -> None:
    packages = ["anthropic>=0.80", "langchain-openai>=1", "openai>=1.60"]
    pytest = ["blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout"]
    session.install("-e", ".[gateway,local]", *packages, *pytest)
    session.run("python", "-m", "pytest", "tests/gateway/test_clients.py", *session.posargs)


# `make test-slow` runs this session. It installs DBOS, a workflow engine, which only the test of its recipe needs.
@nox.session(reuse_venv=True)
def dbos(session: nox.Session) -> None:
    session.install("-e", ".", "dbos>=3", "blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
    session.run("python", "-m", "pytest", "tests/agent/journal/test_dbos_recipe.py", *session.posargs)


# `make test-slow` runs this session: fleets on a local Ray, whose processes would compete with those of other tests.
@nox.session(reuse_venv=True)
def ray(session: nox.Session) -> None:
    pytest = ["blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout"]
    session.install("-e", ".[cli,gateway,local,ray]", *pytest)
    # Without Ray, the tests would be skipped.
    session.run("python", "-c", "import ray", silent=True)
    session.run("python", "-m", "pytest", "tests/fleet", *session.posargs)


# `make test-slow` runs this session. It checks what LLMock says of lmbridge and of other clients, in the versions that
# the table in docs/reliability.md names.
@nox.session(reuse_venv=True)
def referee(session: nox.Session) -> None:
    packages = ["llmock==0.2.2", "openai==3.57.0", "pydantic-ai-slim[openai]==2.68.0"]
    session.install("-e", ".", *packages, "blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
    session.run("python", "-m", "pytest", "tests/programs/test_referee.py", *session.posargs)


@nox.session(reuse_venv=True)
def mcp2(session: nox.Session) -> None:
    _mcp(session, "mcp>=2,<3")


def _mcp(session: nox.Session, sdk: str) -> None:
    packages = ["blockbuster", "hypothesis", "opentelemetry-sdk", "pytest", "pytest-asyncio", "pytest-timeout"]
    packages.append("pytest-xdist")
    session.install("-e", ".[mcp]", sdk, "mcp-server-git", "mcp-server-time", *packages)
    command = ["python", "-m", "pytest", "-n", "auto", "tests/mcp", "tests/real/test_mcp.py"]
    if sdk == SDK_1:
        command += ["-W", SDK_1_WARNING]
    session.run(*command, *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    session.install("-e", ".[cli,gateway,langchain,local,mcp,openai-agents,pydantic-ai,ray]", *DEV)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "lmbridge", "--ignoreexternal")


# `make test-slow` runs this session.
@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    session.install("-e", ".[otel]", *DOCS)
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp(), env={"NO_MKDOCS_2_WARNING": "1"})


# Zensical, the successor of Material for MkDocs, builds the site from mkdocs.yml as well, into the folder `site`.
@nox.session(reuse_venv=True)
def zensical(session: nox.Session) -> None:
    session.install("-e", ".[otel]", "zensical", "mkdocstrings[python]>=1", "ruff>=0.12")
    session.run("zensical", "build", "--strict", "--clean")
    session.run("python", "scripts/site_text.py", "site")


# `make test-slow` runs this session. It checks the code in docs/from-*.md against the types of the other libraries.
@nox.session(reuse_venv=True)
def migrations(session: nox.Session) -> None:
    agents = ["langchain>=1.5", "langchain-openai>=1", "pydantic-ai-slim[openai]>=2.68"]
    session.install(*agents, "lmstudio>=1.5", "ollama>=0.6", "openai>=3", "pyright[nodejs]")
    folder = session.create_tmp()
    session.run("python", "scripts/peer_code.py", folder)
    session.run("pyright", folder)


# What each extra adds, as a command that fails without it.
EXTRAS = {
    "cli": ["lmbridge", "--version"],
    "gateway": ["python", "-c", "import prometheus_client, lmbridge.gateway"],
    "langchain": ["python", "-c", "from lmbridge.interop.langchain import ChatLMBridge"],
    "local": ["python", "-c", "import xllamacpp, lmbridge; lmbridge.LocalServer()"],
    "mcp": ["lmbridge-mcp", "--help"],
    "openai-agents": ["python", "-c", "from lmbridge.interop.openai_agents import LMBridgeModel"],
    "otel": ["python", "-c", "from lmbridge.observe import OpenTelemetryObserver; OpenTelemetryObserver()"],
    "pydantic-ai": ["python", "-c", "from lmbridge.interop.pydantic_ai import LMBridgeModel"],
    "ray": ["python", "-c", "import ray, lmbridge.fleet.ray_backend"],
}


# `make test-slow` runs this session: what a release consists of, and whether it works where there is no checkout.
@nox.session(reuse_venv=True)
def dist(session: nox.Session) -> None:
    session.install("build", "hatchling>=1.26", "twine", "virtualenv")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    packages = _build(session, Path.cwd(), folder / "dist")
    with tarfile.open(packages[".gz"]) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.glob("lmbridge-*")
    # A build from the files of the sdist, at another time and place, has to give the same bytes.
    for kind, again in _build(session, source, folder / "again").items():
        first, second = (hashlib.sha256(each.read_bytes()).hexdigest() for each in (packages[kind], again))
        if first != second:
            session.error(f"{again.name} has other bytes if it is built again")
        session.log(f"{again.name}: {again.stat().st_size:,} bytes, built twice, sha256 {first}")
    session.run("twine", "check", "--strict", *map(str, packages.values()))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (source / "tests").rename(elsewhere / "tests")
    (source / "pyproject.toml").rename(elsewhere / "pyproject.toml")
    for package in packages.values():
        python = _new_environment(session, folder, str(package), "blockbuster", "hypothesis", "pydantic", *PYTEST)
        command = [python, "-m", "pytest", "-q", "-n", "auto", "-m", "not real and not slow"]
        # The other tests need extras, or files that are only in the checkout.
        command += [f"tests/{each}" for each in ("agent", "client", "testing", "transport")]
        with session.chdir(elsewhere):
            session.run(*command, "--ignore=tests/agent/test_mistakes.py", external=True)
    for extra, (program, *arguments) in EXTRAS.items():
        python = _new_environment(session, folder, f"{packages['.whl']}[{extra}]")
        with session.chdir(elsewhere):
            session.run(str(Path(python).with_name(program)), *arguments, external=True, silent=True)
        session.log(f"lmbridge[{extra}] was installed and used alone")


def _build(session: nox.Session, source: Path, target: Path) -> dict[str, Path]:
    """Builds the wheel and the sdist, and returns them by their suffixes."""
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(target), str(source), silent=True)
    return {path.suffix: path for path in sorted(target.iterdir())}


def _new_environment(session: nox.Session, folder: Path, *packages: str) -> str:
    """Returns the Python of a new environment with these packages and nothing else."""
    session.run("python", "-m", "virtualenv", "--clear", "-q", str(folder / "venv"))
    python = next(str(path) for path in folder.glob("venv/*/python*") if path.stem == "python")
    session.run(python, "-m", "pip", "install", "-q", "--no-compile", *packages, external=True, silent=True)
    return python


# `make test-slow` runs this session. It needs the history of git.
@nox.session(reuse_venv=True)
def api(session: nox.Session) -> None:
    session.install("griffelib>=2")
    session.run("python", "scripts/api_changes.py", *session.posargs)
