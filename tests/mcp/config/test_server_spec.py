"""Entries of a configuration: their formats, variables in them, secrets, and errors that name the key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MCPError
from lmbridge.mcp import load_config
from lmbridge.mcp.config.server_spec import ServerSpec
from tests.mcp.config.support import load


def spec(tmp_path: Path, entry: Any) -> ServerSpec:
    """Returns the spec of an entry, or raises its error."""
    config = load(tmp_path, {"mcpServers": {"a": entry}})
    if config.broken:
        raise config.broken["a"]
    return config.servers["a"]


@pytest.mark.parametrize("key", ["mcpServers", "servers"])
def test_the_entry_of_a_program_is_read_from_the_formats_of_all_hosts(tmp_path: Path, key: str) -> None:
    entry = {"command": "npx", "args": ["-y", "server"], "env": {"A": "1"}, "cwd": "data"}
    config = load(tmp_path, {key: {"a": entry}})
    assert config.servers == {
        "a": ServerSpec(
            name="a",
            transport="stdio",
            command="npx",
            args=("-y", "server"),
            env={"A": "1"},
            cwd=str(tmp_path / "data"),
        )
    }
    assert config.path == tmp_path / "mcp.json"


@pytest.mark.parametrize(
    ("entry", "transport"),
    [
        ({"url": "http://127.0.0.1:1/mcp"}, "http"),
        ({"url": "http://127.0.0.1:1/sse"}, "sse"),
        ({"url": "http://127.0.0.1:1/sse/"}, "sse"),
        ({"url": "http://127.0.0.1:1/sse", "type": "http"}, "http"),
        ({"url": "http://127.0.0.1:1/mcp", "type": "sse"}, "sse"),
        ({"url": "http://127.0.0.1:1/mcp", "type": "streamable-http"}, "http"),
        ({"url": "http://127.0.0.1:1/mcp", "transport": "streamableHttp"}, "http"),
        ({"command": "x", "type": "stdio"}, "stdio"),
    ],
)
def test_the_transport_is_given_or_follows_from_the_keys(tmp_path: Path, entry: Any, transport: str) -> None:
    assert spec(tmp_path, entry).transport == transport


def test_headers_and_the_keys_of_lmbridge_are_read(tmp_path: Path) -> None:
    options = {"allow": ["get_*"], "deny": ["get_env"], "connectTimeout": 5, "callTimeout": 2.5}
    read = spec(tmp_path, {"url": "https://x/mcp", "headers": {"Authorization": "Bearer t"}, "lmbridge": options})
    assert read.headers == {"Authorization": "Bearer t"}
    assert (read.allow, read.deny, read.connect_timeout, read.call_timeout) == (("get_*",), ("get_env",), 5.0, 2.5)


@pytest.mark.parametrize("is_camel", [True, False])
def test_the_keys_of_lmbridge_may_be_written_with_underscores(tmp_path: Path, is_camel: bool) -> None:
    camel = {"connectTimeout": 5, "callTimeout": 2, "toolTimeouts": {"build_now": 9}, "maxCallTimeout": 7}
    snake = {re.sub("([A-Z])", lambda found: "_" + found[1].lower(), key): value for key, value in camel.items()}
    read = spec(tmp_path, {"command": "x", "lmbridge": camel if is_camel else snake})
    assert (read.connect_timeout, read.call_timeout, read.max_call_timeout) == (5, 2, 7)
    assert read.tool_timeouts == {"build_now": 9}


@pytest.mark.parametrize(
    ("tool", "seconds"), [("build", 600), ("build_all", 60), ("build_docs", 60), ("search", 20), ("read", 5)]
)
def test_the_time_limit_of_a_tool_is_that_of_its_name_or_first_pattern(
    tmp_path: Path, tool: str, seconds: float
) -> None:
    limits = {"build*": 60, "build": 600, "*_docs": 1, "sear[c]h": 20}
    read = spec(tmp_path, {"command": "x", "lmbridge": {"callTimeout": 5, "toolTimeouts": limits}})
    assert read.timeout_of(tool) == seconds
    without = spec(tmp_path, {"command": "x", "lmbridge": {"toolTimeouts": limits}})
    assert without.timeout_of(tool) == (None if tool == "read" else seconds)


@pytest.mark.parametrize(
    ("tool", "allow", "deny", "offered"),
    [
        ("get_time", None, (), True),
        ("get_time", ("get_*",), (), True),
        ("set_time", ("get_*",), (), False),
        ("get_time", ("get_*",), ("*time",), False),
        ("Get_time", ("get_*",), (), False),
        ("get_time", (), (), False),
    ],
)
def test_a_tool_is_offered_if_it_is_allowed_and_not_denied(tool: str, allow: Any, deny: Any, offered: bool) -> None:
    assert ServerSpec(name="a", transport="stdio", allow=allow, deny=deny).offers(tool) is offered


def test_a_command_with_a_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    assert spec(tmp_path, {"command": "./server"}).command == str(tmp_path / "server")
    assert spec(tmp_path, {"command": "/bin/server"}).command == "/bin/server"
    assert spec(tmp_path, {"command": "server"}).command == "server"


def test_the_home_of_an_unknown_user_in_a_path_is_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    entry = {"command": "~nobody-has-this/bin/server", "cwd": "~nobody-has-this"}
    path.write_text(json.dumps({"mcpServers": {"a": entry}}))
    assert load_config(path).servers["a"].command == str(tmp_path / entry["command"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("arg", "args"), ("enviroment", "env"), ("Command", "command"), ("cmd", "command"), ("header", "headers")],
)
def test_a_misspelled_key_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, meant: str
) -> None:
    spec(tmp_path, {"command": "x", key: "y"})
    assert f"MCP server 'a': the key {key!r} is ignored; did you mean {meant!r}?" in caplog.text


@pytest.mark.parametrize("key", ["alwaysLoad", "autoApprove", "description", "icon", "gallery", "version", "trust"])
def test_a_key_of_another_program_is_no_misspelling(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    spec(tmp_path, {"command": "x", key: True})
    assert "did you mean" not in caplog.text


def test_keys_that_are_not_supported_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec(tmp_path, {"command": "x", "envFile": ".env", "alwaysLoad": True, "sandbox": {}})
    assert "MCP server 'a': these keys are not supported and are ignored: envFile, sandbox" in caplog.text


def test_tools_that_another_program_disables_are_denied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = spec(tmp_path, {"command": "x", "disabledTools": ["rm", "r*"], "lmbridge": {"deny": ["write_*"]}})
    names = ("rm", "r*", "write_file", "read")
    assert [name for name in names if found.offers(name)] == ["read"]
    assert not caplog.text


def test_headers_that_are_sent_without_encryption_over_a_network_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for url in ("http://127.0.0.1/mcp", "https://example.org/mcp"):
        spec(tmp_path, {"url": url, "headers": {"X": "y"}})
    assert caplog.text == ""
    spec(tmp_path, {"url": "http://example.org/mcp", "headers": {"X": "y"}})
    assert "use an https URL" in caplog.text


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${ONE}", "1"),
        # The value of a variable is not filled in again.
        ("a${ONE}b${TWO}c", "a1b${ONE}c"),
        ("${env:ONE}", "1"),
        ("${NOT_SET_HERE:-default}", "default"),
        ("${NOT_SET_HERE:-}", ""),
        ("${NOT_SET_HERE:-a:-b}", "a:-b"),
        ("${EMPTY:-default}", "default"),
        ("${ONE:-default}", "1"),
        ("$ONE {ONE} $", "$ONE {ONE} $"),
    ],
)
def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, filled: str) -> None:
    monkeypatch.setenv("ONE", "1")
    monkeypatch.setenv("TWO", "${ONE}")
    monkeypatch.setenv("EMPTY", "")
    assert spec(tmp_path, {"command": "x", "args": [text], "env": {"A": text}}).args == (filled,)
    assert spec(tmp_path, {"command": "x", "env": {"A": text}}).env == {"A": filled}
    assert spec(tmp_path, {"url": "http://x/", "headers": {"A": text}}).headers == {"A": filled}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"command": "x", "args": ["a", "${NOT_SET_HERE}"]},
            r"a\.args\[1\] needs the environment variable NOT_SET_HERE, which is not set; set NOT_SET_HERE",
        ),
        ({"command": "x", "env": {"K": "${NOT_SET_HERE}"}}, r"a\.env\.K needs the environment variable"),
        ({"url": "http://${NOT_SET_HERE}/"}, r"a\.url needs the environment variable"),
        (
            {"command": "x", "args": ["${input:key}"]},
            r"a\.args\[0\] contains \$\{input:key\}, which is not supported; only \$\{VAR\}",
        ),
    ],
)
def test_a_variable_that_is_not_set_breaks_only_its_server(tmp_path: Path, entry: Any, message: str) -> None:
    config = load(tmp_path, {"mcpServers": {"a": entry, "b": {"command": "x"}}})
    assert config.names == ("a", "b")
    assert list(config.servers) == ["b"]
    with pytest.raises(MCPError, match=rf"mcp\.json: mcpServers\.{message}"):
        raise config.broken["a"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("npx", "mcpServers.a is 'npx'"),
        ({}, "mcpServers.a has neither 'command' nor 'url'"),
        ({"command": "x", "url": "http://x"}, "mcpServers.a has both 'command' and 'url'"),
        ({"command": 5}, "a.command is 5"),
        ({"command": " "}, "a.command is empty"),
        ({"command": "x\0"}, "a.command contains a null character"),
        ({"command": "x", "args": "y"}, "a.args is 'y'; make it a list of strings"),
        ({"command": "x", "args": [1]}, r"a.args\[0\] is 1"),
        ({"command": "x", "env": ["A=1"]}, "a.env is an array"),
        ({"command": "x", "env": {"A": 1}}, "a.env.A is 1"),
        ({"command": "x", "env": {"A=B": "1"}}, "a.env.A=B is not a valid name"),
        ({"command": "x", "type": "http"}, "a.type is 'http'; with 'command' it must be stdio"),
        ({"url": "http://x/", "type": "ws"}, "a.type is 'ws'; with 'url' it must be http or sse"),
        ({"url": "http://x/", "transport": 5}, "a.transport is 5"),
        ({"url": "ftp://x/"}, "a.url is not an http or https URL"),
        ({"url": "http://[/"}, "a.url is not a valid URL"),
        ({"url": 5}, "a.url is 5"),
        ({"url": "http://x/", "headers": {"A": "b\nc"}}, "a.headers.A is not a valid header"),
        ({"command": "x", "disabled": "yes"}, "a.disabled is 'yes'"),
        ({"command": "x", "lmbridge": {"alow": []}}, "a.lmbridge.alow is not a known key; the keys are: allow, deny"),
        ({"command": "x", "lmbridge": {"allow": "x"}}, "a.lmbridge.allow is 'x'"),
        ({"command": "x", "lmbridge": {"callTimeout": 0}}, "a.lmbridge.callTimeout is 0"),
        ({"command": "x", "lmbridge": {"connectTimeout": True}}, "a.lmbridge.connectTimeout is true"),
        ({"command": "x", "lmbridge": []}, "a.lmbridge is an array"),
        ({"command": "x", "lmbridge": {"toolTimeouts": 5}}, "a.lmbridge.toolTimeouts is 5"),
        ({"command": "x", "lmbridge": {"tool_timeouts": {"b": "1s"}}}, "a.lmbridge.toolTimeouts.b is '1s'"),
        ({"command": "x", "lmbridge": {"toolTimeouts": {"b": None}}}, "a.lmbridge.toolTimeouts.b is null"),
        ({"command": "x", "lmbridge": {"toolTimeouts": {"b": -1}}}, "a.lmbridge.toolTimeouts.b is -1"),
        ({"command": "x", "lmbridge": {"callTimeout": 1, "call_timeout": 2}}, "a.lmbridge.call_timeout is given twice"),
    ],
)
def test_an_error_in_an_entry_names_the_file_and_the_key(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(MCPError, match=message) as caught:
        spec(tmp_path, entry)
    assert str(tmp_path / "mcp.json") in str(caught.value)
    assert caught.value.hint


def test_neither_a_repr_nor_an_error_shows_a_secret(tmp_path: Path) -> None:
    read = spec(tmp_path, {"url": "https://me:pass-word@x/mcp?key=secret-key", "headers": {"A": "Bearer top-secret"}})
    assert "secret" not in repr(read)
    assert read.redact("top-secret, pass-word, key=secret-key, Bearer top-secret") == "***, ***, ***, ***"
    assert read.target == "https://x/mcp"
    with pytest.raises(MCPError) as caught:
        spec(tmp_path, {"command": "x", "env": "a-long-text-that-is-a-secret"})
    assert "a-long-text" not in str(caught.value)


def test_the_server_of_lmbridge_is_recognized_by_its_command() -> None:
    def is_lmbridge(command: str, *args: str) -> bool:
        return ServerSpec(name="a", transport="stdio", command=command, args=args).is_lmbridge

    assert is_lmbridge("python", "-m", "lmbridge.mcp")
    assert is_lmbridge("/usr/bin/python3", "-I", "-m", "lmbridge")
    assert is_lmbridge("/usr/local/bin/lmbridge", "mcp")
    assert is_lmbridge("lmbridge-mcp")
    assert not is_lmbridge("python", "-m", "lmbridge_other")
    assert not is_lmbridge("npx", "-y", "lmbridge")
