"""Sessions that need a separate environment: other Pythons, older libraries, the documentation as a site."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "tests", "aioresponses", "mcp1", "mcp2"]

DEV = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "dev")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install("-e", ".[gateway,local,mcp]", *DEV)
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)


# `make test-slow` runs this session, too, because the tests of the session depend on what aiohttp does.
@nox.session(reuse_venv=True)
def oldest(session: nox.Session) -> None:
    packages = ["blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"]
    session.install("-e", ".", "aiohttp==3.13.0", *packages)
    command = ["python", "-m", "pytest", "-n", "auto", *(session.posargs or ["tests/transport"])]
    session.run(*command)
    # Where aiohttp has no compiled parser, it uses another one, which has other habits.
    session.run(*command, env={"AIOHTTP_NO_EXTENSIONS": "1"})


# `make test-slow` runs this session, so it uses the current Python and installs only what its tests need.
@nox.session(reuse_venv=True)
def aioresponses(session: nox.Session) -> None:
    packages = ["aioresponses", "blockbuster", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"]
    session.install("-e", ".", "aiohttp<3.14", *packages)
    session.run("python", "-m", "pytest", "tests/aioresponses", *session.posargs)


# `make test-slow` also runs this one. `make test` covers SDK 2.x, which is installed in its environment.
@nox.session(reuse_venv=True)
def mcp1(session: nox.Session) -> None:
    _mcp(session, "mcp<2")


# `make test-slow` runs this session: programs of others, which only the tests of the gateway need.
@nox.session(reuse_venv=True)
def clients(session: nox.Session) -> None:
    packages = ["anthropic>=0.80", "langchain-openai>=1", "openai>=1.60"]
    pytest = ["blockbuster", "pytest", "pytest-asyncio", "pytest-timeout"]
    session.install("-e", ".[gateway,local]", *packages, *pytest)
    session.run("python", "-m", "pytest", "tests/gateway/test_clients.py", *session.posargs)


@nox.session(reuse_venv=True)
def mcp2(session: nox.Session) -> None:
    _mcp(session, "mcp>=2,<3")


def _mcp(session: nox.Session, sdk: str) -> None:
    packages = ["blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"]
    session.install("-e", ".[mcp]", sdk, "mcp-server-git", "mcp-server-time", *packages)
    session.run("python", "-m", "pytest", "-n", "auto", "tests/mcp", "tests/real/test_mcp.py", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    session.install("-e", ".[gateway,local,mcp]", *DEV)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "lmbridge", "--ignoreexternal")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    session.install("mkdocs>=1.6,<2")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())
