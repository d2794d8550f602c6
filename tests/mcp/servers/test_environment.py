"""The environment of stdio servers: what they get, what they do not get, and what an error says about it."""

from __future__ import annotations

import json
import os
import sys

import pytest

from lmbridge import MCPConnectionError, MultiMCPError
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.servers.environment import missing_variables, redact_proxy_passwords
from tests.mcp.conftest import MakeHub
from tests.mcp.support import function_of


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of two variables, to which a test adds its own."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH")}
    monkeypatch.setattr(os, "environ", kept)
    return monkeypatch


@pytest.mark.parametrize(
    "name",
    [
        *("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "NO_PROXY", "no_proxy"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"),
    ],
)
async def test_a_server_gets_proxies_and_ca_bundles(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "/the/value")
    lease = await make_hub({"a": {}}).tools()
    assert json.loads(await function_of(lease, "env")())[name] == "/the/value"


async def test_the_entry_of_a_server_overrides_a_proxy(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    lease = await make_hub({"a": {"env": {"HTTPS_PROXY": ""}}}).tools()
    assert json.loads(await function_of(lease, "env")())["HTTPS_PROXY"] == ""


async def test_the_error_names_a_variable_that_the_server_asks_for_and_did_not_get(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", "very secret value")
    monkeypatch.setenv("OTHER_API_KEY", "another secret")
    program = "import os, sys; 'ACME_API_KEY' in os.environ or sys.exit('ACME_API_KEY is not set')"
    hub = make_hub({"a": {"command": sys.executable, "args": ["-I", "-S", "-c", program]}})
    with pytest.raises(MultiMCPError) as caught:
        await hub.tools()
    error = caught.value.errors["a"]
    assert isinstance(error, MCPConnectionError)
    text = str(error)
    assert "it did not get these variables of your environment: ACME_API_KEY" in text
    assert 'pass it on with "env": {"ACME_API_KEY": "${ACME_API_KEY}"}' in text
    assert "secret" not in text
    assert "OTHER_API_KEY" not in text
    assert error.context["missing_variables"][0] == "ACME_API_KEY"


async def test_a_program_that_was_not_found_says_nothing_about_variables(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOWHERE_TOKEN", "x")
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"nowhere": {"command": "/nowhere/server"}}).tools()
    assert "variables" not in str(caught.value)


def test_the_variables_of_the_service_and_of_the_package_runner_are_named(bare_environment: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_TOKEN", "npm_config_registry", "UV_DEFAULT_INDEX", "ACME_TOKEN", "PYTHONPATH"):
        bare_environment.setenv(name, "x")
    npx = ServerSpec(name="gh", transport="stdio", command="npx", args=("-y", "@modelcontextprotocol/server-github"))
    named = missing_variables(npx, "ACME_TOKEN is missing")
    assert named == ["ACME_TOKEN", "GITHUB_TOKEN", "npm_config_registry", "PYTHONPATH"]
    uvx = ServerSpec(name="clock", transport="stdio", command="uvx", args=("mcp-server-time",))
    assert missing_variables(uvx, "") == ["UV_DEFAULT_INDEX", "PYTHONPATH"]
    program = ServerSpec(name="x", transport="stdio", command="/usr/bin/python3", args=("-m", "mcp_server_time"))
    assert missing_variables(program, "") == ["PYTHONPATH"]


def test_a_variable_that_the_entry_sets_is_not_missing(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("GITHUB_TOKEN", "x")
    spec = ServerSpec(name="github", transport="stdio", command="server", env={"GITHUB_TOKEN": "y"})
    assert missing_variables(spec, "GITHUB_TOKEN") == []


@pytest.mark.parametrize("url", ["http://me:p%40ss@proxy:3128", "me:p%40ss@proxy:3128"])
def test_the_password_of_a_proxy_is_redacted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("https_proxy", url)
    assert (
        redact_proxy_passwords(f"cannot reach {url} with p@ss")
        == f"cannot reach {url.replace('p%40ss', '***')} with ***"
    )
