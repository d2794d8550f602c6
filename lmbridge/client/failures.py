"""What a server's body means: which error it is, and whether to ask again.

The body decides, not the status alone: llama.cpp answers mistakes of the client with 500, LM Studio errors with 200,
and every server words them differently. The texts below were met on real servers or in their issue trackers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import attrs

from lmbridge._text import excerpt
from lmbridge.client.wire import decode_json
from lmbridge.errors import (
    ContextLengthExceededError,
    ErrorDetails,
    LLMAuthenticationError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
)
from lmbridge.transport import Reply, Verdict

_SEARCHED: Final = 10_000
"""Characters of a message that are searched for known words."""


class _Words:
    """Looks for any of some patterns. They are compiled when the first error comes: that takes milliseconds."""

    def __init__(self, *patterns: str) -> None:
        self.pattern: Final = "|".join(patterns)

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE | re.DOTALL)

    def search(self, text: str) -> re.Match[str] | None:
        return self._compiled.search(text)

    def match(self, text: str) -> re.Match[str] | None:
        return self._compiled.match(text)


# What an error's message, type and code are searched for: `Said.words`. Never a reply.

_NOTHING_LOADED: Final = _Words(
    r"\bno models? (are |is )?(currently )?loaded\b",  # LM Studio
    r"\bmodel is not loaded\b",  # llama.cpp's router with autoload off
)
_EVICTED: Final = _Words(r"\bmodel (is |was |has been )?unloaded\b")  # LM Studio
_NOT_LOADED: Final = _Words(
    r"\binsufficient system resources\b",  # LM Studio's guardrails
    r"\brequires more (system |gpu )?memory\b",  # Ollama
    r"\bout of memory\b",
    r"\bmodel loading (was )?(stopped|aborted|failed)\b",
    r"\b(failed to|unable to|could not) load (the )?model\b",  # LM Studio, Ollama, LocalAI
    r"\bmodel \S{1,200} failed to load\b",  # llama.cpp's router: "model name=x failed to load"
    r"\berror (while )?loading (the )?model\b",
    r"\bmodel_load_failed\b",
    r"\bmodel (has )?crashed\b",
    r"\bunknown exception during inferencing\b",  # LM Studio, before it named crashes
    r"\brunner (process )?has (terminated|unexpectedly stopped)\b",  # Ollama
)
_CONTEXT: Final = _Words(
    r"\bexceed_context_size_error\b",  # llama.cpp
    r"\bcontext_length_exceeded\b",  # OpenAI, llama-cpp-python
    # Not "must not exceed": that is about a parameter.
    r"(?<!not )\bexceed(s|ed)? (\S{1,40} ){0,3}context (length|size|window)\b",  # llama.cpp, Ollama, SGLang
    r"\bcontext (length|size|window) (has been )?exceeded\b",  # llama.cpp and MLX, while they generate
    r"\bmaximum context length is \d",  # OpenAI, vLLM, llama-cpp-python
    r"\b(greater|longer) than the (model's )?(context|maximum model) length\b",  # LM Studio, SGLang, vLLM
    r"\bnot fit in(to)? (the )?context\b",  # MLX
    r"\btoo long to fit into the model \(context\b",  # vLLM
    r"\bcontext (the )?overflows\b",  # LM Studio: "when context the overflows"
    r"\breached context length of \d",  # LM Studio
)
_NOT_FOUND: Final = _Words(
    r"\bmodel_not_found\b",
    r"\binvalid model identifier\b",  # LM Studio
    r"\bmodel ['\"`][^'\"`\n]{1,200}['\"`] (was )?(not found|does not exist)\b",  # LM Studio, Ollama, llama.cpp, vLLM
    r"\bmodel \S{0,99}[\d/:@]\S{0,99} (was )?(not found|does not exist)\b",  # no quotes: it has to look like a name
    r"^(the )?(requested )?model (was )?not found\b",
    r"\bcould not find (real )?modelid for\b",  # llama-swap
    r"\binvalid model name passed\b",  # litellm
)
_LOADING: Final = _Words(r"\bloading\b")
_LOADING_FAILED: Final = _Words(_NOT_LOADED.pattern, r"\b(failed|failure|stopped|aborted)\b", r"\berror loading\b")
# In the type and the code alone: an error's text may speak of any of these.
_REFUSED: Final = _Words(r"invalid_api_key", r"authentication_?error", r"unauthorized")
_TOO_MANY: Final = _Words(r"rate_?limit")

# 500s that come again however often they are asked for: mistakes in the request, named by llama.cpp and its templates.
_MISTAKE: Final = _Words(
    r"\[json\.exception\.",
    r"\bjinja\b",
    r"\btemplate\b",
    r"\bsystem message must be\b",
    r"\broles must alternate\b",
    r"\bno user query found\b",
    r"\b(image|audio) input is not supported\b",
    r"\btoo large to process\b",
    r"\bgrammar\b",
    r"\bjson ?schema\b",
    r"\bunrecognized schema\b",
    r"\binvalid[ _]request",
    r"\bexpected .{1,80}\bgot\b",
    r"\bdoes not match the expected\b",
    r"\btool with name .{1,80} not found\b",  # llama-cpp-python, as is the next
    r"\bcan only concatenate str\b",
)
# These say what is wrong with the request by repeating it: the rest of their words are the caller's.
_REPEATS_REQUEST: Final = _Words(r"failed to parse\b", r"\d+ validation errors?\b", r"\[\{'type'")
# Neither a page nor half a JSON object is what a server says; words in it may be anybody's.
_PAGE: Final = _Words(r"\s*<(!doctype|\?xml|html|head|body)\b")
_BROKEN_JSON: Final = _Words(r"\s*(\{|\[\s*[\[{\"])")

_STATUS: Final = _Words(r"[1-5]\d\d\Z")

_UNKNOWN_PATH: Final = _Words(
    r"unexpected endpoint or method",  # LM Studio, with status 200
    r"^((file|page|route|path) )?not found\.?$",  # llama.cpp, FastAPI
    r"^404 page not found$",  # Ollama
    r"^method not allowed\.?$",
    r"^invalid url\b",
    r"^cannot (get|post) /",
)

_LISTED: Final = (
    _Words(r"\(e\.g\.,? (?P<names>[^)]+)\)"),  # "... a valid downloaded model (e.g., a, b)"
    _Words(r"your models:\s*(?P<names>.+)"),  # one a line
)
_QUOTED: Final = _Words(r"['\"`]([^'\"`\n]{1,200})['\"`]")
_PROMPT_TOKENS: Final = tuple(
    _Words(pattern)
    for pattern in (
        r"\bn_prompt_tokens\W+(\d+)",  # llama.cpp's field, in a text that repeats its JSON
        r"\bn_keep: ?(\d+)",
        r"\bkeep the first (\d+) tokens",
        r"\((\d+)(?: tokens)? in (?:the messages|your prompt)",
        r"(\d+) input tokens",
        r"(\d+) tokens from the input",
        r"\b(?:request|input|prompt) (?:has |\((?:(?:total )?length )?)(\d+)",
    )
)
_CONTEXT_LENGTH: Final = tuple(
    _Words(pattern)
    for pattern in (
        r"\bn_ctx\W+(\d+)",
        r"\bcontext (?:length|size|window)(?: (?:of|is|only|supports))* \(?(\d+)",
        r"\bmaximum model length of (\d+)",
    )
)

_SERVER_HINT: Final = "check that api_base is an OpenAI-compatible server"
_PATH_HINT: Final = "the server does not know this path; check api_base"
_LOAD_HINT: Final = "load a model first: in LM Studio's developer page, with `lms load`, or at the server's start"
_EVICTED_HINT: Final = (
    "the server dropped the model, maybe for another one that was asked for meanwhile; on a server that holds one"
    ' model, switch model scheduling on with Limits(max_loaded_models=1), or limits="auto"'
)
_HINTS: Final[Mapping[type[LLMError], str]] = {
    LLMAuthenticationError: "pass api_key=, or set LM_API_TOKEN",
    LLMRateLimitError: "send fewer requests at a time (Limits.max_concurrency), or wait",
    ContextLengthExceededError: "shorten the messages, lower max_tokens, or load the model with a longer context",
    ModelLoadError: "see the server's own log; a smaller model or a shorter context needs less memory",
    ModelNotFoundError: "list_models() tells what the server has",
}


def is_about_loading(error: LLMError) -> bool:
    """Whether it shows that the model is not loaded, or no longer."""
    return isinstance(error, ModelLoadError | ModelMismatchError | ModelChangedDuringExecutionError)


Redact = Callable[[str], str]
"""Takes the secrets out of a text: a server may repeat the key that it refuses."""


@attrs.frozen
class Said:
    """What a server said, whatever the shape in which it said it."""

    message: str
    text: str
    """The whole body."""
    kind: str = ""
    """Its `type` and `code`."""
    code: int | None = None
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    is_bare: bool = False
    """Whether it is no JSON object."""

    @property
    def words(self) -> str:
        """What the patterns look at: message, type and code, but no text that repeats somebody else's words."""
        is_foreign = (
            _REPEATS_REQUEST.match(self.message)
            or _PAGE.match(self.message)
            or (self.is_bare and _BROKEN_JSON.match(self.message))
        )
        return self.kind if is_foreign else f"{self.message[:_SEARCHED]} {self.kind}"


def read(text: str) -> Said:
    """Reads an error out of a body: JSON of any of the known shapes, or bare text."""
    bare = text.removeprefix("\ufeff").strip()
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return Said(bare, text, is_bare=True)
    if not isinstance(value, Mapping):
        return Said(value.strip() if isinstance(value, str) else bare, text, is_bare=True)
    inner = value.get("error")
    if isinstance(inner, str) and inner:
        message, fields = inner, value
    else:
        fields = inner if isinstance(inner, Mapping) else value
        whole = _json(inner) if isinstance(inner, Mapping | list) and inner else bare
        message = next(_messages(fields, value), whole)
    kind, code = _mark(fields.get("type")), _mark(fields.get("code"))
    return Said(message, text, f"{kind} {code}", int(code) if _STATUS.match(code) else None, fields)


def _mark(value: object) -> str:
    return str(value)[:100] if isinstance(value, str | int) else ""


def is_error(value: Mapping[str, Any]) -> bool:
    """Whether a parsed body or event reports an error instead of being a reply."""
    error = value.get("error")
    if error is None and "choices" in value and value.get("object") != "error":
        return False  # nearly all
    if error or value.get("object") == "error":
        return True
    if any(key in value for key in ("choices", "data", "output", "models")):
        return False
    if error not in (None, False) or value.get("detail"):
        return True
    return any(isinstance(value.get(key), str) and value[key] for key in _TOLD_BY)


def reports_error(data: bytes) -> bool:
    """Whether a body with a good status, or the data of an event, reports an error, or is no JSON object at all."""
    try:
        value = decode_json(data)
    except ValueError:
        return True
    if value is None:
        return False  # llama.cpp sends one before each of several prompts
    return not isinstance(value, dict) or is_error(value)


def classify(status: int, _headers: Mapping[str, str], body: bytes) -> Verdict:
    """Whether an HTTP error is worth asking again: the transport's `Classify`."""
    said = read(body.decode("utf-8", "replace"))
    if _NOTHING_LOADED.search(said.words):
        return Verdict.FAIL
    if status == 503 and _LOADING.search(said.words) and not _LOADING_FAILED.search(said.words):
        return Verdict.POLL
    if status in (408, 429, 502, 503, 504):
        return Verdict.RETRY
    if status == 500 and type_of_error(said, status) is None and not _is_mistake(said):
        return Verdict.RETRY
    return Verdict.FAIL


def _is_mistake(said: Said) -> bool:
    return bool(_REPEATS_REQUEST.match(said.message) or _MISTAKE.search(said.words))


def type_of_error(said: Said, status: int | None) -> type[LLMError] | None:
    """The class that the body, or else the status, names; None for just any error."""
    code = status if status is not None and status >= 400 else said.code
    if code in (401, 403) or _REFUSED.search(said.kind):
        return LLMAuthenticationError
    if code == 429 or _TOO_MANY.search(said.kind):
        return LLMRateLimitError
    for pattern, kind in (
        (_CONTEXT, ContextLengthExceededError),
        (_NOTHING_LOADED, ModelLoadError),
        (_EVICTED, ModelLoadError),
        (_NOT_LOADED, ModelLoadError),
        (_NOT_FOUND, ModelNotFoundError),
    ):
        if pattern.search(said.words):
            return kind
    return None


def error_of_reply(reply: Reply, redact: Redact) -> LLMError:
    """The error for a whole answer that is not the reply that was asked for."""
    said = read(redact(reply.body.decode("utf-8", "replace")))
    details = ErrorDetails(context=reply.call.context(), status=reply.status)
    if 300 <= reply.status < 400:
        target = _without_query(redact(reply.headers.get("Location", "nowhere")))
        details["hint"] = "redirects are not followed, lest key and prompt go elsewhere; set api_base to the target"
        details["body"] = said.text
        return LLMResponseError(f"the server redirects ({reply.status}) to {target}", **details)
    kind = type_of_error(said, reply.status) or LLMResponseError
    told = f"the server answered {reply.status}{_what_it_said(said, reply.status, kind)}"
    error = _make(kind, told, said, details)
    if isinstance(error, LLMResponseError):
        error.retry_after = reply.retry_after
    return error


def _what_it_said(said: Said, status: int, kind: type[LLMError]) -> str:
    text = excerpt(said.message)
    if not text:
        return " with an empty body"
    if status >= 300:
        return f": {text}"
    if said.is_bare and kind is LLMResponseError:
        return f" with something that is neither a JSON object nor an event stream: {text}"
    return f", but with an error: {text}"


def error_of_event(said: Said, context: Mapping[str, Any]) -> LLMError:
    """The error for an event, or for bare text, that ends a stream."""
    kind = type_of_error(said, None) or LLMStreamError
    what = f": {excerpt(said.message)}" if said.message else " with an error that has no text"
    return _make(kind, f"the server ended the stream{what}", said, ErrorDetails(context=context))


def _make(kind: type[LLMError], told: str, said: Said, details: ErrorDetails) -> LLMError:
    details = {**details, "body": said.text, "hint": _hint(kind, said, details.get("status"))}
    if kind is ModelNotFoundError:
        asked = (details.get("context") or {}).get("model")
        if asked is None and (named := _QUOTED.search(said.message)):
            asked = named[1]
        return ModelNotFoundError(asked, _listed_models(said.message), **details)
    if kind is ContextLengthExceededError:
        prompt, length = _tokens(said)
        return ContextLengthExceededError(told, prompt_tokens=prompt, context_length=length, **details)
    return kind(told, **details)


def _hint(kind: type[LLMError], said: Said, status: int | None) -> str | None:
    if kind is ModelLoadError:
        if _EVICTED.search(said.words):
            return _EVICTED_HINT
        if _NOTHING_LOADED.search(said.words):
            return _LOAD_HINT
    elif kind not in _HINTS:
        no_words = not said.message or _PAGE.match(said.message)
        if _UNKNOWN_PATH.search(said.message) or (status in (404, 405) and no_words):
            return _PATH_HINT
        if status is not None and status < 300 and said.is_bare:
            return _SERVER_HINT
    return _HINTS.get(kind)


_TOLD_BY: Final = ("message", "detail", "details")
"""Fields that may hold an error's message: OpenAI, vLLM, FastAPI, and what wraps them."""


def _messages(*places: Mapping[str, Any]) -> Iterator[str]:
    for value in (fields.get(key) for fields in places for key in _TOLD_BY):
        if isinstance(value, Mapping) and value:
            yield next(_messages(value), _json(value))
        elif isinstance(value, list) and value:
            yield _json([_without_input(item) for item in value])
        elif isinstance(value, str) and value:
            yield value


def _without_input(item: object) -> object:
    """An item of FastAPI's list of what is wrong with a request, without the part of the request that it repeats."""
    return {key: value for key, value in item.items() if key != "input"} if isinstance(item, Mapping) else item


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


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
        prompt if isinstance(prompt, int) else _first_number(_PROMPT_TOKENS, said.message),
        length if isinstance(length, int) else _first_number(_CONTEXT_LENGTH, said.message),
    )


def _first_number(patterns: tuple[_Words, ...], text: str) -> int | None:
    found = next(filter(None, (pattern.search(text) for pattern in patterns)), None)
    return int(found[1]) if found and len(found[1]) < 19 else None  # int() refuses thousands of digits


def _without_query(location: str) -> str:
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", location, maxsplit=1)[0])
