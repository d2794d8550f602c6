"""Images as parts of a message."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Final

from lmbridge._checks import wrong_type
from lmbridge._text import shorten
from lmbridge.errors import LLMValidationError
from lmbridge.types import ImagePart

_IMAGE_FORMATS: Final = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
"""How files begin, for each format that servers read."""
_OTHER_FORMATS: Final = {
    "a HEIC": re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL),
    "an AVIF": re.compile(rb".{4}ftypavi[fs]", re.DOTALL),
    "a BMP": re.compile(rb"BM.{12}", re.DOTALL),
    "a TIFF": re.compile(rb"II\*\x00|MM\x00\*"),
    "an ICO": re.compile(rb"\x00\x00\x01\x00"),
    "an SVG": re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg\b", re.DOTALL),
    "a PDF": re.compile(rb"%PDF-"),
}
"""How files of other formats begin, so that errors can name the format."""
_MEDIA_TYPES: Final = frozenset({*_IMAGE_FORMATS, "image/jpg"})
_QUOTED_ARGUMENT_CHARACTERS: Final = 200
"""The number of characters of an argument that an error quotes."""
_SOURCES_HINT: Final = "give a path, the bytes of a file, or a data URL like 'data:image/png;base64,...'"
_CONVERT_HINT: Final = "convert it to PNG or JPEG, which all servers read"
_NOT_READ: Final = "not a PNG, JPEG, GIF or WebP"


def image_part(source: str | os.PathLike[str] | bytes) -> ImagePart:
    """Returns the content part of a message that shows an image, as a data URL.

    For example::

        question = {"type": "text", "text": "What is in this picture?"}
        await client.chat_completion([{"role": "user", "content": [question, image_part("picture.png")]}])

    The image is a PNG, JPEG, GIF or WebP. Its first bytes decide which one it is, not the name of the file or the media
    type of a data URL. All servers with a vision model read PNG and JPEG, but some refuse WebP or GIF (llama.cpp and
    several versions of LM Studio do not read WebP). Of an animation, a model sees at most one frame.

    URLs on the web are refused, because local servers do not fetch them (LM Studio answers them with 400).

    A file is read synchronously, which blocks. In an event loop, give the bytes, or call this function with
    `asyncio.to_thread`.

    Args:
        source: A path, the bytes of a file, or a data URL.

    Raises:
        LLMValidationError: The file cannot be read, or is not an image of these formats.
    """
    data = _read_source(source)
    if not data:
        raise LLMValidationError("the image is empty", hint=_SOURCES_HINT)
    media_type = next((kind for kind, start in _IMAGE_FORMATS.items() if start.match(data)), None)
    if media_type is None:
        other = next((name for name, start in _OTHER_FORMATS.items() if start.match(data[:1000])), None)
        found = f"begins with {data[:12]!r}, which is" if other is None else f"is {other},"
        raise LLMValidationError(f"the image {found} {_NOT_READ}", hint=_CONVERT_HINT)
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{base64.b64encode(data).decode()}"}}


def _read_source(source: object) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _decode_data_url(source)
        if scheme.startswith(("http://", "https://")):
            raise LLMValidationError(
                f"the image is a URL, {_quoted(source)}", hint="fetch it first: local servers take images inline"
            )
    elif not isinstance(source, os.PathLike):
        raise wrong_type("the image", "a path, bytes or a data URL", source, _SOURCES_HINT)
    if not source:
        raise LLMValidationError("the image is an empty string", hint=_SOURCES_HINT)
    try:
        return Path(source).read_bytes()
    # A path that contains a NUL character raises a ValueError.
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise LLMValidationError(
            f"cannot read the image {_quoted(str(source))}: {reason}", exc, hint=_SOURCES_HINT
        ) from exc


def _decode_data_url(url: str) -> bytes:
    head, _, payload = url.partition(",")
    media_type, *options = head[len("data:") :].lower().split(";")
    if media_type not in _MEDIA_TYPES:
        raise LLMValidationError(
            f"the data URL is labelled {_quoted(media_type)}, which is {_NOT_READ}", hint=_CONVERT_HINT
        )
    if "base64" not in options:
        raise LLMValidationError("the data URL is not base64", hint=_SOURCES_HINT)
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as exc:
        raise LLMValidationError(f"the data URL is not valid base64: {exc}", exc, hint=_SOURCES_HINT) from exc


def _quoted(text: str) -> str:
    return repr(shorten(text, _QUOTED_ARGUMENT_CHARACTERS))
