"""Configuration files: formats, places, variables, trust, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import MCPError
from lmbridge.mcp import McpConfig, load_config
from lmbridge.mcp.config.files import is_offered
from lmbridge.mcp.config.jsonc import parse_json
from lmbridge.mcp.config.spec import ServerSpec


def load(tmp_path: Path, document: Any) -> McpConfig:
    path = tmp_path / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_config(path)


def spec(tmp_path: Path, entry: Any) -> ServerSpec:
    """The spec of an entry, or its error."""
    config = load(tmp_path, {"mcpServers": {"a": entry}})
    if config.broken:
        raise config.broken["a"]
    return config.servers["a"]


# Formats


@pytest.mark.parametrize("key", ["mcpServers", "servers"])
def test_a_program_is_read_from_the_formats_of_all_hosts(tmp_path: Path, key: str) -> None:
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


def test_headers_and_the_keys_of_our_own_are_read(tmp_path: Path) -> None:
    ours = {"allow": ["get_*"], "deny": ["get_env"], "connectTimeout": 5, "callTimeout": 2.5}
    read = spec(tmp_path, {"url": "https://x/mcp", "headers": {"Authorization": "Bearer t"}, "lmbridge": ours})
    assert read.headers == {"Authorization": "Bearer t"}
    assert (read.allow, read.deny, read.connect_timeout, read.call_timeout) == (("get_*",), ("get_env",), 5.0, 2.5)


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
    assert is_offered(tool, ServerSpec(name="a", transport="stdio", allow=allow, deny=deny)) is offered


def test_disabled_servers_are_none_whatever_else_they_say(tmp_path: Path) -> None:
    servers = {"a": {"disabled": True, "command": "${NOT_SET_HERE}"}, "b": {"enabled": False}, "c": {"command": "x"}}
    config = load(tmp_path, {"mcpServers": servers})
    assert (config.names, config.disabled, dict(config.broken)) == (("c",), ("a", "b"), {})


def test_comments_and_a_comma_too_many_are_read(tmp_path: Path) -> None:
    text = """\ufeff{
        // of VS Code
        "servers": { /* several
        lines */ "a": {"command": "x // no comment", "args": ["/*", ",]", "\\"", ],},
        },
    }"""
    path = tmp_path / "mcp.json"
    path.write_text(text, encoding="utf-8")
    read = load_config(path).servers["a"]
    assert (read.command, read.args) == (str(tmp_path / "x // no comment"), ("/*", ",]", '"'))


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_plain_json_is_read_as_json(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, indent=1, ensure_ascii=False)) == value


def test_a_program_with_a_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    assert spec(tmp_path, {"command": "./server"}).command == str(tmp_path / "server")
    assert spec(tmp_path, {"command": "/bin/server"}).command == "/bin/server"
    assert spec(tmp_path, {"command": "server"}).command == "server"


def test_what_is_not_supported_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec(tmp_path, {"command": "x", "envFile": ".env", "alwaysLoad": True, "disabledTools": ["rm"]})
    assert "MCP server 'a': not supported, and ignored: disabledTools, envFile" in caplog.text


def test_headers_that_go_over_a_network_as_plain_text_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for url in ("http://127.0.0.1/mcp", "https://example.org/mcp"):
        spec(tmp_path, {"url": url, "headers": {"X": "y"}})
    assert caplog.text == ""
    spec(tmp_path, {"url": "http://example.org/mcp", "headers": {"X": "y"}})
    assert "use https" in caplog.text


# Variables


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${ONE}", "1"),
        ("a${ONE}b${TWO}c", "a1b${ONE}c"),  # once
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
    ("entry", "told"),
    [
        (
            {"command": "x", "args": ["a", "${NOT_SET_HERE}"]},
            r"a\.args\[1\] needs the environment variable NOT_SET_HERE, which is not set; set NOT_SET_HERE",
        ),
        ({"command": "x", "env": {"K": "${NOT_SET_HERE}"}}, r"a\.env\.K needs the environment variable"),
        ({"url": "http://${NOT_SET_HERE}/"}, r"a\.url needs the environment variable"),
        ({"command": "x", "args": ["${input:key}"]}, r"a\.args\[0\] asks for \$\{input:key\}; only \$\{VAR\}"),
    ],
)
def test_a_variable_that_is_not_set_fails_that_server_by_name(tmp_path: Path, entry: Any, told: str) -> None:
    config = load(tmp_path, {"mcpServers": {"a": entry, "b": {"command": "x"}}})
    assert config.names == ("a", "b")
    assert list(config.servers) == ["b"]
    with pytest.raises(MCPError, match=rf"mcp\.json: mcpServers\.{told}"):
        raise config.broken["a"]


# Errors


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (
            '{\n  "mcpServers": {\n    "a": {"command" "x"}\n  }\n}',
            r"is no JSON: Expecting ':' delimiter at line 3 column 21",
        ),
        ("", "is no JSON: Expecting value at line 1 column 1"),
        ('{"mcpServers": {"a": {}, "a": {}}}', "the key 'a' is there twice"),
        ({}, "has neither 'mcpServers' nor 'servers'"),
        ([], "has neither 'mcpServers' nor 'servers'"),
        ({"mcpServers": {}, "servers": {}}, "has both 'mcpServers' and 'servers'"),
        ({"mcpServers": []}, "mcpServers is a list"),
        ({"mcpServers": None}, "mcpServers is null"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_with_its_place(tmp_path: Path, document: Any, told: str) -> None:
    with pytest.raises(MCPError, match=told) as caught:
        load(tmp_path, document)
    assert str(tmp_path / "mcp.json") in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("npx", "mcpServers.a is 'npx'"),
        ({}, "mcpServers.a has neither 'command' nor 'url'"),
        ({"command": "x", "url": "http://x"}, "mcpServers.a has both 'command' and 'url'"),
        ({"command": 5}, "a.command is 5"),
        ({"command": " "}, "a.command is empty"),
        ({"command": "x\0"}, "a.command holds a null character"),
        ({"command": "x", "args": "y"}, "a.args is 'y'; make it a list of texts"),
        ({"command": "x", "args": [1]}, r"a.args\[0\] is 1"),
        ({"command": "x", "env": ["A=1"]}, "a.env is a list"),
        ({"command": "x", "env": {"A": 1}}, "a.env.A is 1"),
        ({"command": "x", "env": {"A=B": "1"}}, "a.env.A=B is no name"),
        ({"command": "x", "type": "http"}, "a.type is 'http'; with 'command' it is stdio"),
        ({"url": "http://x/", "type": "ws"}, "a.type is 'ws'; with 'url' it is http or sse"),
        ({"url": "http://x/", "transport": 5}, "a.transport is 5"),
        ({"url": "ftp://x/"}, "a.url is no http or https URL"),
        ({"url": "http://[/"}, "a.url is no URL"),
        ({"url": 5}, "a.url is 5"),
        ({"url": "http://x/", "headers": {"A": "b\nc"}}, "a.headers.A is no header"),
        ({"command": "x", "disabled": "yes"}, "a.disabled is 'yes'"),
        ({"command": "x", "lmbridge": {"alow": []}}, "a.lmbridge.alow is not known; there are: allow, deny"),
        ({"command": "x", "lmbridge": {"allow": "x"}}, "a.lmbridge.allow is 'x'"),
        ({"command": "x", "lmbridge": {"callTimeout": 0}}, "a.lmbridge.callTimeout is 0"),
        ({"command": "x", "lmbridge": {"connectTimeout": True}}, "a.lmbridge.connectTimeout is True"),
        ({"command": "x", "lmbridge": []}, "a.lmbridge is a list"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told_with_its_key(tmp_path: Path, entry: Any, told: str) -> None:
    with pytest.raises(MCPError, match=told) as caught:
        spec(tmp_path, entry)
    assert str(tmp_path / "mcp.json") in str(caught.value)
    assert caught.value.hint


def test_secrets_are_in_no_repr_and_no_error(tmp_path: Path) -> None:
    read = spec(tmp_path, {"url": "https://me:pass-word@x/mcp?key=secret-key", "headers": {"A": "Bearer top-secret"}})
    assert "secret" not in repr(read)
    assert read.redacted("top-secret, pass-word, key=secret-key, Bearer top-secret") == "***, ***, ***, ***"
    assert read.target == "https://x/mcp"
    with pytest.raises(MCPError) as caught:
        spec(tmp_path, {"command": "x", "env": "a-long-text-that-is-a-secret"})
    assert "a-long-text" not in str(caught.value)


# Places


def place(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"mcpServers": {name: {"command": "x"}}}))
    return path


def test_files_are_searched_in_order(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config() == McpConfig()
    place(own_home / ".mcp.json", "home")
    assert load_config().names == ("home",)
    place(own_home / ".lmstudio" / "mcp.json", "lmstudio")
    assert load_config().names == ("lmstudio",)
    place(Path(".mcp.json"), "project")
    assert load_config(trust_project=True).names == ("project",)
    monkeypatch.setenv("MCP_JSON_PATH", str(place(tmp_path / "named.json", "named")))
    assert load_config(trust_project=True).names == ("named",)
    assert load_config(place(tmp_path / "given.json", "given")).names == ("given",)


@pytest.mark.parametrize("value", ["", "0", "true"])
def test_a_file_of_the_project_is_not_trusted_unless_somebody_says_so(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    place(own_home / ".mcp.json", "home")
    place(Path(".mcp.json"), "project")
    monkeypatch.setenv("LMBRIDGE_TRUST_PROJECT", value)
    config = load_config()
    assert config.names == ("home",)
    assert config.untrusted == Path.cwd() / ".mcp.json"
    assert "LMBRIDGE_TRUST_PROJECT=1" in str(config.unknown("project"))
    monkeypatch.setenv("LMBRIDGE_TRUST_PROJECT", "1")
    assert load_config().names == ("project",)


def test_ones_own_file_needs_no_trust_if_the_home_is_the_working_directory(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(own_home / ".mcp.json", "home")
    monkeypatch.chdir(own_home)
    config = load_config()
    assert (config.names, config.untrusted) == (("home",), None)


@pytest.mark.parametrize("source", ["config_path", "MCP_JSON_PATH"])
def test_a_file_that_was_named_has_to_be_there(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("MCP_JSON_PATH", "/nowhere/mcp.json")
    with pytest.raises(MCPError, match=f"{source} is '/nowhere/mcp.json', and there is no such file"):
        load_config("/nowhere/mcp.json" if source == "config_path" else None)


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(tmp_path / "mcp.json", "a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MCPError, match="cannot be read: Permission denied"):
        load_config(path)


def test_without_any_file_the_unknown_name_error_says_where_it_looked() -> None:
    text = str(load_config().unknown("a"))
    assert "there is no MCP server 'a'; there are: none" in text
    assert ".lmstudio/mcp.json" in text


def test_lmbridges_own_server_is_known_by_its_command() -> None:
    def is_ours(command: str, *args: str) -> bool:
        return ServerSpec(name="a", transport="stdio", command=command, args=args).is_lmbridge

    assert is_ours("python", "-m", "lmbridge.mcp")
    assert is_ours("/usr/bin/python3", "-I", "-m", "lmbridge")
    assert is_ours("/usr/local/bin/lmbridge", "mcp")
    assert is_ours("lmbridge-mcp")
    assert not is_ours("python", "-m", "lmbridge_other")
    assert not is_ours("npx", "-y", "lmbridge")


def test_a_home_that_nobody_has_is_an_error_of_that_server(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    entry = {"command": "~nobody-has-this/bin/server", "cwd": "~nobody-has-this"}
    path.write_text(json.dumps({"mcpServers": {"a": entry}}))
    assert load_config(path).servers["a"].command == str(tmp_path / entry["command"])


@pytest.mark.parametrize("given", ["~nobody-has-this/mcp.json", "x" * 5_000])
def test_a_path_that_cannot_be_one_is_told(given: str) -> None:
    with pytest.raises(MCPError, match="there is no such file"):
        load_config(given)


def test_without_a_working_directory_or_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        raise error

    monkeypatch.setattr(Path, "cwd", lambda: fails(FileNotFoundError()))
    assert load_config().path is None
    monkeypatch.setattr(Path, "home", lambda: fails(RuntimeError()))
    assert load_config().path is None


def test_a_file_that_is_too_large_to_be_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes(b" " * (4 * 2**20 + 1))
    with pytest.raises(MCPError, match="is larger than 4 MiB"):
        load_config(path)
