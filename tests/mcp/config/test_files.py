"""Configuration files: where they are searched for, which are trusted, and errors of a file as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MCPError
from lmbridge.mcp import McpConfig, load_config
from tests.mcp.config.support import load


def write_config(path: Path, name: str) -> Path:
    """Writes a configuration with one server of the given name, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"mcpServers": {name: {"command": "x"}}}))
    return path


def test_a_disabled_server_is_not_read_any_further(tmp_path: Path) -> None:
    servers = {"a": {"disabled": True, "command": "${NOT_SET_HERE}"}, "b": {"enabled": False}, "c": {"command": "x"}}
    config = load(tmp_path, {"mcpServers": servers})
    assert (config.names, config.disabled, dict(config.broken)) == (("c",), ("a", "b"), {})


def test_a_file_of_vs_code_is_read_with_its_comments_and_byte_order_mark(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            '{\n  "mcpServers": {\n    "a": {"command" "x"}\n  }\n}',
            r"is not valid JSON: Expecting ':' delimiter at line 3 column 21",
        ),
        ("", "is not valid JSON: Expecting value at line 1 column 1"),
        ('{"mcpServers": {"a": {}, "a": {}}}', "the key 'a' occurs twice"),
        ({}, "has neither 'mcpServers' nor 'servers'"),
        ([], "has neither 'mcpServers' nor 'servers'"),
        ({"mcpServers": {}, "servers": {}}, "has both 'mcpServers' and 'servers'"),
        ({"mcpServers": []}, "mcpServers is an array"),
        ({"mcpServers": True}, "mcpServers is true"),
        ({"mcpServers": 5}, "mcpServers is 5"),
        ({"mcpServers": None}, "mcpServers is null"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_error_in_the_file_names_its_path_and_the_place(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(MCPError, match=message) as caught:
        load(tmp_path, document)
    assert str(tmp_path / "mcp.json") in str(caught.value)
    assert caught.value.hint


def test_files_are_searched_in_order(empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config() == McpConfig()
    write_config(empty_home / ".mcp.json", "home")
    assert load_config().names == ("home",)
    write_config(empty_home / ".lmstudio" / "mcp.json", "lmstudio")
    assert load_config().names == ("lmstudio",)
    write_config(Path(".mcp.json"), "project")
    assert load_config(trust_project=True).names == ("project",)
    monkeypatch.setenv("MCP_JSON_PATH", str(write_config(tmp_path / "named.json", "named")))
    assert load_config(trust_project=True).names == ("named",)
    assert load_config(write_config(tmp_path / "given.json", "given")).names == ("given",)


@pytest.mark.parametrize("value", ["", "0", "true"])
def test_the_file_of_a_project_is_skipped_unless_it_is_trusted(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    write_config(empty_home / ".mcp.json", "home")
    write_config(Path(".mcp.json"), "project")
    monkeypatch.setenv("LMBRIDGE_TRUST_PROJECT", value)
    config = load_config()
    assert config.names == ("home",)
    assert config.untrusted == Path.cwd() / ".mcp.json"
    assert "LMBRIDGE_TRUST_PROJECT=1" in str(config.unknown_server("project"))
    monkeypatch.setenv("LMBRIDGE_TRUST_PROJECT", "1")
    assert load_config().names == ("project",)


def test_the_file_in_the_home_needs_no_trust_if_the_home_is_the_working_directory(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(empty_home / ".mcp.json", "home")
    monkeypatch.chdir(empty_home)
    config = load_config()
    assert (config.names, config.untrusted) == (("home",), None)


@pytest.mark.parametrize("source", ["config_path", "MCP_JSON_PATH"])
def test_a_file_that_was_named_must_exist(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("MCP_JSON_PATH", "/nowhere/mcp.json")
    with pytest.raises(MCPError, match=f"{source} is '/nowhere/mcp.json', but that file does not exist"):
        load_config("/nowhere/mcp.json" if source == "config_path" else None)


@pytest.mark.parametrize("given", ["~nobody-has-this/mcp.json", "x" * 5_000])
def test_a_path_that_cannot_exist_is_an_error(given: str) -> None:
    with pytest.raises(MCPError, match="that file does not exist"):
        load_config(given)


def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path / "mcp.json", "a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MCPError, match="cannot be read: Permission denied"):
        load_config(path)


def test_a_file_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes(b" " * (4 * 2**20 + 1))
    with pytest.raises(MCPError, match="is larger than 4 MiB"):
        load_config(path)


def test_without_any_file_the_unknown_name_error_lists_where_it_searched() -> None:
    text = str(load_config().unknown_server("a"))
    assert "unknown MCP server 'a'; the enabled ones are: none" in text
    assert ".lmstudio/mcp.json" in text


def test_a_process_without_a_working_directory_or_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        raise error

    monkeypatch.setattr(Path, "cwd", lambda: fail(FileNotFoundError()))
    assert load_config().path is None
    monkeypatch.setattr(Path, "home", lambda: fail(RuntimeError()))
    assert load_config().path is None
