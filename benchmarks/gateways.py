"""Gateways between a client and a server, each in a separate process: lmbridge's and others.

The process prints its address as a line, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from benchmarks.processes import PEER_CORE, MeasurementError, PinnedProcess

_START_SECONDS: Final = 120.0
_HOP_BY_HOP: Final = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "host"))
_PR_SET_PDEATHSIG: Final = 1
_MANY: Final = 2000
"""More requests than any row has in flight, so that none of them waits in a gateway."""


class GatewayProcess(PinnedProcess):
    """A new gateway in a separate process.

    Args:
        kind: "bare", "lmbridge" or "litellm".
        upstream: The base address of the server.
        one_model: Whether the server holds one model, and answers four requests at a time.

    Raises:
        MeasurementError: The gateway did not start.
    """

    def __init__(self, kind: str, upstream: str, *, one_model: bool = False) -> None:
        super().__init__(PEER_CORE, "-m", "benchmarks.gateways", kind, upstream, str(int(one_model)))
        self.api_base = self.read(_START_SECONDS).strip()
        if not self.api_base:
            raise MeasurementError(f"the gateway {kind!r} did not start")

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the process so far, from the clock that Linux has for each process."""
        return time.clock_gettime((~self._process.pid << 3) | 2)

    @property
    def resident_kib(self) -> float:
        """The resident memory of the process, in KiB."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024


@asynccontextmanager
async def _bare_proxy(upstream: str) -> AsyncIterator[str]:
    """A reverse proxy as short as aiohttp allows: the limit of what a gateway on aiohttp can reach."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(), connector=connector, auto_decompress=False
    ) as http:

        async def forward(request: web.Request) -> web.StreamResponse:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
            url = upstream.removesuffix("/v1") + request.path_qs
            async with http.request(request.method, url, data=await request.read(), headers=headers) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def _lmbridge_gateway(upstream: str, *, one_model: bool) -> AsyncIterator[str]:
    from lmbridge import Limits  # noqa: PLC0415 - the others do not need it
    from lmbridge.gateway import Gateway  # noqa: PLC0415 - as above

    limits = Limits(max_concurrency=4, max_loaded_models=1) if one_model else Limits(max_concurrency=_MANY)
    async with Gateway(upstreams=[upstream], limits=limits) as gateway:
        yield gateway.api_base


def _become_litellm(upstream: str) -> None:
    """Replaces this process by litellm's proxy, which is ready some seconds later; see `wait_until_ready`."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    model = {"model": "openai/*", "api_base": upstream, "api_key": "none"}
    settings: dict[str, Any] = {
        "model_list": [{"model_name": "*", "litellm_params": model}],
        # It listens on the loopback interface for the time of the measurement, so it needs no key.
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    file = Path(tempfile.mkdtemp()) / "config.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(settings))
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # The proxy does not read stdin, so the system has to kill it when its parent ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    script = Path(sys.executable).with_name("litellm")
    options = ("--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False")
    os.execv(sys.executable, [sys.executable, str(script), *options])


async def wait_until_ready(is_ready: Callable[[], Awaitable[bool]]) -> None:
    """Waits until a gateway answers.

    Raises:
        MeasurementError: It never did.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            if await is_ready():
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise MeasurementError("the gateway is not ready")


async def _serve(kind: str, upstream: str, one_model: bool) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    started = _bare_proxy(upstream) if kind == "bare" else _lmbridge_gateway(upstream, one_model=one_model)
    async with started as api_base:
        print(api_base, flush=True)
        await ended.wait()


if __name__ == "__main__":
    if sys.argv[1] == "litellm":
        _become_litellm(sys.argv[2])
    asyncio.run(_serve(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
