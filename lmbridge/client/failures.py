"""What a server's body means: which error it is, and whether to ask again.

The body decides, not the status alone: llama.cpp answers mistakes of the client with 500, LM Studio errors with 200,
and every server words them differently. The texts below were met on real servers or in their issue trackers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from lmbridge.errors import (
    ContextLengthExceededError,
    ErrorDetails,
    LLMAuthenticationError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    ModelLoadError,
    ModelNotFoundError,
)
from lmbridge.transport import Reply, Verdict

_SHOWN: Final = 500
"""Characters of a body that an error's text repeats; all of it is in `.body`."""


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE | re.DOTALL)


_LOADING: Final = _any(r"\bloading\b(?!.{0,40}\b(failed|stopped|error))")
_NOTHING_LOADED: Final = _any(r"no models? (are |is )?(currently )?loaded", r"\bmodel is not loaded")
_EVICTED: Final = _any(r"\bmodel (is |was |has been )?unloaded")
_NOT_LOADED: Final = _any(
    r"insufficient system resources",
    r"out of memory",
    r"failed to load",
    r"error loading model",
    r"model loading (was stopped|failed)",
    r"model_load_failed",
    r"model (has )?crashed",
)
_CONTEXT: Final = _any(
    r"exceed_context_size",
    r"context_length_exceeded",
    r"exceeds? the (available |model'?s? )?(maximum )?context",
    r"maximum context length",
    r"greater than the context length",
    r"context the overflows",  # LM Studio's own word order
    r"context overflows",
    r"reached context length",
    r"context size has been exceeded",
    r"n_keep: ?\d+ ?>= ?n_ctx",
)
_NOT_FOUND: Final = _any(
    r"\bmodel_not_found\b",
    r"invalid model identifier",
    r"\bmodel ['\"`]?[^'\"`\n]{1,200}['\"`]? (was )?(not found|does not exist)",
)
# 500s that come again however often they are asked for: mistakes in the request, named by llama.cpp and its templates.
_DETERMINISTIC: Final = _any(
    r"failed to parse",
    r"parse[_ ]error",
    r"jinja",
    r"template",
    r"system message must be",
    r"roles must alternate",
    r"no user query found",
    r"image input is not supported",
    r"grammar",
    r"json ?schema",
    r"unrecognized schema",
    r"validation error",
    r"invalid[ _]request",
    r"expected .{0,80} got",
    r"does not match the expected",
)
_UNKNOWN_PATH: Final = _any(r"unexpected endpoint or method")

_LISTED: Final = (
    re.compile(r"\(e\.g\.,? (?P<names>[^)]+)\)"),  # "... a valid downloaded model (e.g., a, b)"
    re.compile(r"your models:\s*(?P<names>.+)", re.IGNORECASE | re.DOTALL),  # one a line
)
_PROMPT_TOKENS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"n_keep: ?(\d+)",
        r"\((\d+)(?: tokens)? in (?:the messages|your prompt)",
        r"requested (\d+) tokens",
    )
)
_CONTEXT_LENGTH: Final = (
    re.compile(r"n_ctx: ?(\d+)"),
    re.compile(r"context (?:length|size)(?: is| of)? ?\(?(\d+)", re.IGNORECASE),
)

_LOAD_HINT: Final = "load a model first: in LM Studio's developer page, with `lms load`, or at the server's start"
_EVICTED_HINT: Final = (
    "the server dropped the model, maybe because another one was asked for meanwhile: a server that holds one model"
    " wants requests for different models one after another"
)
_CONTEXT_HINT: Final = "shorten the messages, lower max_tokens, or load the model with a longer context"


Redact = Callable[[str], str]
"""Takes the secrets out of a text: a server may repeat the key that it refuses."""


@attrs.frozen
class Said:
    """What a server said, whatever the shape in which it said it."""

    message: str
    text: str
    """The whole body."""
    kind: str = ""
    """Its `type` and `code`, as far as they are words."""
    code: int | None = None
    fields: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def all_words(self) -> str:
        """The message with the type and the code, for the patterns."""
        return f"{self.message} {self.kind}"


def read(text: str) -> Said:
    """Reads an error out of a body: JSON of any of the known shapes, or bare text."""
    try:
        value = json.loads(text)
    except ValueError:
        return Said(text.strip(), text)
    if isinstance(value, Mapping):
        inner = value.get("error")
        if isinstance(inner, str) and inner:
            return Said(inner, text, fields=value)
        fields = inner if isinstance(inner, Mapping) and inner else value
        message = next(_messages(fields, value), None) or text
        code = fields.get("code")
        words = " ".join(str(fields[key]) for key in ("type", "code") if isinstance(fields.get(key), str))
        number = code if isinstance(code, int) and not isinstance(code, bool) else None
        return Said(message, text, words, number, fields)
    return Said(value if isinstance(value, str) else text.strip(), text)


def is_error(value: Mapping[str, Any]) -> bool:
    """Whether a parsed body or event reports an error instead of being a reply."""
    if value.get("error"):
        return True
    return value.get("object") == "error" or ("choices" not in value and any(_messages(value)))


def classify(status: int, _headers: Mapping[str, str], body: bytes) -> Verdict:
    """Whether an HTTP error is worth asking again: the transport's `Classify`."""
    said = read(body.decode("utf-8", "replace"))
    if _NOTHING_LOADED.search(said.all_words):
        return Verdict.FAIL
    if status == 503 and _LOADING.search(said.all_words):
        return Verdict.POLL
    if status in (408, 429, 502, 503, 504):
        return Verdict.RETRY
    if status == 500 and type_of_error(said, status) is None and not _DETERMINISTIC.search(said.all_words):
        return Verdict.RETRY
    return Verdict.FAIL


def type_of_error(said: Said, status: int | None) -> type[LLMError] | None:
    """The class that the body, or else the status, names; None for just any error."""
    words = said.all_words
    code = status if status is not None and status >= 400 else said.code
    if code in (401, 403) or "invalid_api_key" in words or "authentication_error" in words:
        return LLMAuthenticationError
    if code == 429:
        return LLMRateLimitError
    for pattern, kind in (
        (_CONTEXT, ContextLengthExceededError),
        (_NOTHING_LOADED, ModelLoadError),
        (_EVICTED, ModelLoadError),
        (_NOT_LOADED, ModelLoadError),
        (_NOT_FOUND, ModelNotFoundError),
    ):
        if pattern.search(words):
            return kind
    return None


def error_of_reply(reply: Reply, redact: Redact) -> LLMError:
    """The error for a whole answer that is not the reply that was asked for."""
    said = read(redact(reply.body.decode("utf-8", "replace")))
    kind = type_of_error(said, reply.status) or LLMResponseError
    but = ", but with an error" if reply.status < 300 else ""
    told = f"the server answered {reply.status}{but}: {shortened(said.message) or 'with an empty body'}"
    if 300 <= reply.status < 400:
        told = f"the server redirects ({reply.status}) to {_without_query(reply.headers.get('Location', 'nowhere'))}"
    error = _make(kind, told, said, ErrorDetails(context=reply.call.context(), status=reply.status))
    if 300 <= reply.status < 400:
        error.hint = "redirects are not followed, lest key and prompt go elsewhere; set api_base to the target"
    if isinstance(error, LLMResponseError):
        error.retry_after = reply.retry_after
    return error


def error_of_event(said: Said, context: Mapping[str, Any]) -> LLMError:
    """The error for an event, or for bare text, that ends a stream."""
    kind = type_of_error(said, None) or LLMStreamError
    return _make(kind, f"the server ended the stream: {shortened(said.message)}", said, ErrorDetails(context=context))


def _make(kind: type[LLMError], told: str, said: Said, details: ErrorDetails) -> LLMError:
    details = {**details, "body": said.text, "hint": _hint(kind, said)}
    if kind is ModelNotFoundError:
        asked = (details.get("context") or {}).get("model")
        return ModelNotFoundError(asked, _listed_models(said.message), **details)
    if kind is ContextLengthExceededError:
        prompt, length = _tokens(said)
        return ContextLengthExceededError(told, prompt_tokens=prompt, context_length=length, **details)
    return kind(told, **details)


def _hint(kind: type[LLMError], said: Said) -> str | None:
    if _UNKNOWN_PATH.search(said.message):
        return "the server does not know this path; check api_base"
    if _EVICTED.search(said.all_words):
        return _EVICTED_HINT
    if _NOTHING_LOADED.search(said.all_words):
        return _LOAD_HINT
    return {
        LLMAuthenticationError: "pass api_key=, or set LM_API_TOKEN",
        LLMRateLimitError: "send fewer requests at a time (Limits.max_concurrency), or wait",
        ContextLengthExceededError: _CONTEXT_HINT,
        ModelLoadError: "see the server's own log; a smaller model or a shorter context needs less memory",
        ModelNotFoundError: "list_models() tells what the server has",
    }.get(kind)


def _messages(*places: Mapping[str, Any]) -> Iterator[str]:
    """The texts that may be an error's message: OpenAI, vLLM, FastAPI, and what wraps them."""
    for fields in places:
        for key in ("message", "detail", "details", "error_description"):
            value = fields.get(key)
            if isinstance(value, str) and value:
                yield value
            elif isinstance(value, list | Mapping) and value:
                yield json.dumps(value)


def _listed_models(message: str) -> list[str]:
    """The models that the server named in its text."""
    for pattern in _LISTED:
        if found := pattern.search(message):
            names = (name.strip(" -*\t\r") for name in re.split(r"[,\n]", found["names"]))
            return [name for name in names if name and name != "..."]
    return []


def _tokens(said: Said) -> tuple[int | None, int | None]:
    """Tokens of the prompt, and of the context, as llama.cpp tells them in fields and others in their text."""
    prompt, length = said.fields.get("n_prompt_tokens"), said.fields.get("n_ctx")
    return (
        prompt if isinstance(prompt, int) else _first_number(_PROMPT_TOKENS, said.text),
        length if isinstance(length, int) else _first_number(_CONTEXT_LENGTH, said.text),
    )


def _first_number(patterns: tuple[re.Pattern[str], ...], text: str) -> int | None:
    found = next(filter(None, (pattern.search(text) for pattern in patterns)), None)
    return int(found[1]) if found else None


def shortened(text: str) -> str:
    """The text, or its beginning with how long it is."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _without_query(location: str) -> str:
    return re.sub(r"//[^/@]*@", "//", location.partition("?")[0])
