"""What the error of a server that cannot be started suggests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmbridge import MultiMCPError
from tests.mcp.conftest import MakeHub
from tests.mcp.support import SERVER, names


@pytest.mark.parametrize(
    ("command", "program", "args"),
    [
        ("npx -y some-server", "npx", '["-y", "some-server"]'),
        ("npx -y @scope/some-server /home/me", "npx", '["-y", "@scope/some-server", "/home/me"]'),
        ("no-such-program 'one argument' --flag", "no-such-program", '["one argument", "--flag"]'),
        ("/no/such/program --flag", "/no/such/program", '["--flag"]'),
        ("no-such-program it's", "no-such-program", '["it\'s"]'),
    ],
)
async def test_a_command_that_contains_its_arguments_is_to_be_split(
    make_hub: MakeHub, command: str, program: str, args: str
) -> None:
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": {"command": command}}).tools()
    hint = f'the command contains its arguments, so split it: "command": "{program}", "args": {args}'
    assert str(caught.value).endswith(f"could not be started: {command!r} was not found; {hint}")


async def test_a_missing_program_whose_path_may_contain_a_space_is_not_only_to_be_split(make_hub: MakeHub) -> None:
    with pytest.raises(MultiMCPError, match="was not found; check the path of the command; or, if it contains its arg"):
        await make_hub({"a": {"command": "/no/such/My Server/run"}}).tools()


async def test_a_program_whose_path_contains_spaces_is_started(make_hub: MakeHub, tmp_path: Path) -> None:
    program = tmp_path / "my programs" / "a server"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S {SERVER}\n")
    program.chmod(0o755)
    for command in (str(program), "my programs/a server", "./my programs/a server"):
        hub = make_hub({"a": {"command": command}})
        assert "echo" in names((await hub.tools()).tools)
        await hub.close()


async def test_a_folder_that_does_not_exist_is_blamed(make_hub: MakeHub) -> None:
    with pytest.raises(MultiMCPError, match=r'create that folder, or correct "cwd" in the configuration'):
        await make_hub({"a": {"command": sys.executable, "cwd": "/no/such/folder"}}).tools()


async def test_a_file_that_is_not_executable_is_blamed(make_hub: MakeHub, tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text("")
    with pytest.raises(MultiMCPError, match="make the file executable, or start it with its interpreter"):
        await make_hub({"a": {"command": str(program)}}).tools()


async def test_a_program_that_does_not_exist_is_to_be_installed(make_hub: MakeHub) -> None:
    with pytest.raises(MultiMCPError, match="'no-such-program' was not found; install it, or give its full path"):
        await make_hub({"a": {"command": "no-such-program"}}).tools()
