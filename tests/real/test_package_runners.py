"""Real npx and uvx with empty caches: first starts work, and after a killed npx the error says what to delete."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MultiMCPError
from tests.mcp.conftest import MakeHub
from tests.mcp.support import names

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]
LOCKS = "_npx/*/concurrency.lock"


def require(program: str, host: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    try:
        socket.create_connection((host, 443), timeout=10).close()
    except OSError:
        pytest.skip(f"needs a connection to {host}")


@pytest.fixture
def npx(tmp_path: Path) -> dict[str, Any]:
    """The entry of a server that npx downloads into an empty cache."""
    require("npx", "registry.npmjs.org")
    return {
        "command": "npx",
        "args": ["-y", "@modelcontextprotocol/server-everything"],
        "env": {"npm_config_cache": str(tmp_path / "cache")},
    }


async def wait_for_lock(cache: Path, process: asyncio.subprocess.Process | None = None) -> None:
    """Waits until npx has locked the folder into which it installs the server."""
    while not await asyncio.to_thread(lambda: list(cache.glob(LOCKS))):
        if process is not None and process.returncode is not None:
            pytest.skip("this version of npm has no lock")
        await asyncio.sleep(0.02)


async def test_the_first_start_with_npx_downloads_the_server(make_hub: MakeHub, npx: dict[str, Any]) -> None:
    hub = make_hub({"everything": npx})
    assert "echo" in names((await hub.tools()).tools)
    assert "npm http" not in hub.status()["everything"].stderr_tail


async def test_after_npx_was_killed_the_error_names_the_folder_whose_deletion_helps(
    make_hub: MakeHub, npx: dict[str, Any], tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        npx["command"],
        *npx["args"],
        env={**os.environ, **npx["env"]},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await wait_for_lock(tmp_path / "cache", process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"everything": npx}, connect_timeout=8).tools()
    assert "wrote nothing to stderr for 8 seconds" in str(caught.value)
    folder = tmp_path / "cache" / "_npx"
    assert f"delete the folder {folder} and try again" in str(caught.value)
    shutil.rmtree(folder)
    assert "echo" in names((await make_hub({"everything": npx}).tools()).tools)


async def test_a_start_with_npx_that_is_given_up_leaves_no_lock(
    make_hub: MakeHub, npx: dict[str, Any], tmp_path: Path
) -> None:
    hub = make_hub({"everything": npx})
    starting = asyncio.create_task(hub.tools())
    await wait_for_lock(tmp_path / "cache")
    starting.cancel()
    await asyncio.wait([starting])
    await hub.close()
    assert not list((tmp_path / "cache").glob(LOCKS))


async def test_the_first_start_with_uvx_downloads_the_server(make_hub: MakeHub, tmp_path: Path) -> None:
    require("uvx", "pypi.org")
    entry = {
        "command": "uvx",
        "args": ["mcp-server-time"],
        "env": {"UV_CACHE_DIR": str(tmp_path / "cache")},
    }
    assert "get_current_time" in names((await make_hub({"time": entry}).tools()).tools)
