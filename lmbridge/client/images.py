"""Images as parts of a message."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any, Final

from lmbridge._text import shorten
from lmbridge.errors import LLMValidationError

_MAGIC: Final = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_LABELS: Final = frozenset({"image/png", "image/jpeg", "image/jpg"})
_SHOWN: Final = 200
"""Characters of an argument that an error's text repeats."""
_HINT: Final = "give a path, the bytes of a file, or a data URL like 'data:image/png;base64,...'"
_CONVERT: Final = "convert it to PNG or JPEG: local servers read little else"


def image_part(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """The content part of a message that shows an image: PNG or JPEG, as a data URL.

    What it is its first bytes say, not the name of the file or the label in the URL. A file is read at once, which
    blocks: in an event loop give the bytes, or call it by `asyncio.to_thread`. URLs are refused: local servers fetch
    nothing (LM Studio answers them with 400), and neither does this function.

    Args:
        source: A path, the bytes of a file, or a data URL.

    Raises:
        LLMValidationError: no such file, or no image that servers read.
    """
    data = _read(source)
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        found = f"begins with {data[:12]!r}, which is neither PNG nor JPEG" if data else "is empty"
        raise LLMValidationError(f"the image {found}", hint=_CONVERT if data else _HINT)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def _read(source: object) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _decode(source)
        if scheme.startswith(("http://", "https://")):
            raise LLMValidationError(
                f"the image is a URL, {shorten(source, _SHOWN)!r}",
                hint="fetch it first: local servers take images inline",
            )
    elif not isinstance(source, os.PathLike):
        raise LLMValidationError(f"the image is of type {type(source).__name__}", hint=_HINT)
    if not source:
        raise LLMValidationError("the image is an empty string", hint=_HINT)
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as exc:  # ValueError: a path that holds a NUL
        reason = getattr(exc, "strerror", None) or exc
        raise LLMValidationError(
            f"cannot read the image {shorten(str(source), _SHOWN)!r}: {reason}", exc, hint=_HINT
        ) from exc


def _decode(url: str) -> bytes:
    head, _, payload = url.partition(",")
    label, *options = head[len("data:") :].lower().split(";")
    if label not in _LABELS:
        raise LLMValidationError(f"the data URL is labelled {shorten(label, _SHOWN)!r}, no PNG or JPEG", hint=_CONVERT)
    if "base64" not in options:
        raise LLMValidationError("the data URL holds no base64", hint=_HINT)
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as exc:
        raise LLMValidationError(f"the data URL holds no base64: {exc}", exc, hint=_HINT) from exc
