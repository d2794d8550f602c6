"""Classifies the errors of model servers: which exception to raise, and whether the request may be sent again.

The status alone is not enough: llama.cpp reports mistakes of the client with status 500, LM Studio reports errors with
status 200, and every server words the same failure differently. Therefore a body is first parsed into an `ErrorBody`,
whatever its JSON looks like, and its message is then searched for the patterns below. All of them were seen on real
servers or in their issue trackers, and the tests quote each of them, in `tests/client/test_failures.py` or as a capture
in `tests/data`.

A body may also be hostile, or simply huge. So every search looks at a limited part of it, and takes time that is
proportional to the size of that part. In particular, no pattern may begin to match at many places of a text and read
on to the end from each of them.

Matching texts is fragile, but servers have no other field in common. A text that no pattern matches does no harm:
the error is then a plain `LLMResponseError`, or an `LLMStreamError` inside a stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from lmbridge._text import excerpt
from lmbridge.client.error_body import ErrorBody, Redact, parse_error_body, unredacted
from lmbridge.client.redirects import redirect_error
from lmbridge.client.text_patterns import TextPatterns
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
from lmbridge.transport import Call, Reply, Verdict
from lmbridge.transport.sse import begins_event_stream

# The texts of errors. They are searched for in `ErrorBody.searched_text`, never in a successful reply.

_NO_MODEL_LOADED: Final = TextPatterns(
    r"\bno models? (are |is )?(currently )?loaded\b",  # LM Studio
    r"\bmodel is not loaded\b",  # llama.cpp's router with autoload off
)
_MODEL_EVICTED: Final = TextPatterns(r"\bmodel (is |was |has been )?unloaded\b")  # LM Studio
_MODEL_PROCESS_ENDED: Final = TextPatterns(r"\bproxy error: failed to read connection\b")  # llama.cpp's router
_MODEL_LOAD_FAILED: Final = TextPatterns(
    r"\binsufficient system resources\b",  # LM Studio's guardrails
    r"\brequires more (system |gpu )?memory\b",  # Ollama
    r"\bout of memory\b",
    r"\bmodel loading (was )?(stopped|aborted|failed)\b",
    r"\b(failed to|unable to|could not) load (the )?model\b",  # LM Studio, Ollama, LocalAI
    r"\bmodel \S{1,200} failed to load\b",  # llama.cpp's router: "model name=x failed to load"
    r"\berror (while )?loading (the )?model\b",
    r"\bmodel_load_failed\b",
    r"\bmodel (has )?crashed\b",
    r"\bunknown exception during inferencing\b",  # older LM Studio, for a crash
    r"\brunner (process )?has (terminated|unexpectedly stopped)\b",  # Ollama
)
_CONTEXT_EXCEEDED: Final = TextPatterns(
    r"\bexceed_context_size_error\b",  # llama.cpp
    r"\bcontext_length_exceeded\b",  # OpenAI, llama-cpp-python
    # "must not exceed the context length" is excluded, because it is about a parameter and not about the prompt.
    r"(?<!not )\bexceed(s|ed)? (\S{1,40} ){0,3}context (length|size|window)\b",  # llama.cpp, Ollama, SGLang
    r"\bcontext (length|size|window) (has been )?exceeded\b",  # llama.cpp and MLX, while they generate
    r"\bmaximum context length is \d",  # OpenAI, vLLM, llama-cpp-python
    r"\b(greater|longer) than the (model's )?(context|maximum model) length\b",  # LM Studio, SGLang, vLLM
    r"\bnot fit in(to)? (the )?context\b",  # MLX
    r"\btoo long to fit into the model \(context\b",  # vLLM
    r"\bcontext (the )?overflows\b",  # LM Studio: "when context the overflows"
    r"\breached context length of \d",  # LM Studio
)
_MODEL_NOT_FOUND: Final = TextPatterns(
    r"\bmodel_not_found\b",
    r"\binvalid model identifier\b",  # LM Studio
    r"\bmodel ['\"`][^'\"`\n]{1,200}['\"`] (was )?(not found|does not exist)\b",  # LM Studio, Ollama, llama.cpp, vLLM
    # A name without quotes is only recognized if it contains a digit or one of "/", ":" and "@".
    r"\bmodel \S{0,99}[\d/:@]\S{0,99} (was )?(not found|does not exist)\b",
    r"^(the )?(requested )?model (was )?not found\b",
    r"\bcould not find (real )?modelid for\b",  # llama-swap
    r"\binvalid model name passed\b",  # litellm
)
_STILL_LOADING: Final = TextPatterns(r"\bloading\b")
_NO_LONGER_LOADING: Final = TextPatterns(
    _MODEL_LOAD_FAILED.pattern, r"\b(failed|failure|stopped|aborted)\b", r"\berror loading\b"
)
# These are searched for in the type and the code alone, because a message may mention them for other reasons.
_AUTHENTICATION: Final = TextPatterns(r"invalid_api_key", r"authentication_?error", r"unauthorized")
_RATE_LIMIT: Final = TextPatterns(r"rate_?limit")

# Mistakes in the request that llama.cpp and its chat templates report with status 500. The same request would fail in
# the same way every time, so it is not sent again.
_REQUEST_MISTAKE: Final = TextPatterns(
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
    r"\btool with name .{1,80} not found\b",  # llama-cpp-python
    r"\bcan only concatenate str\b",  # llama-cpp-python
)
UNKNOWN_PATH_OF_LM_STUDIO: Final = "unexpected endpoint or method"
"""What LM Studio answers, with status 200, to a request for a path that it does not have, in lower case."""
_UNKNOWN_PATH: Final = TextPatterns(
    UNKNOWN_PATH_OF_LM_STUDIO,
    r"^((file|page|route|path) )?not found\.?$",  # llama.cpp, FastAPI
    r"^404 page not found$",  # Ollama
    r"^method not allowed\.?$",
    r"^invalid url\b",
    r"^cannot (get|post) /",
)

_TLS_EXPECTED: Final = TextPatterns(
    r"\bhttp request (was sent )?to (an )?https (server|port)\b",  # Go, nginx
    r"\bspeaking plain http to an ssl-enabled\b",  # Apache
)

# Where the list of existing models begins and ends in a message.
_MODEL_LISTS: Final = (
    (TextPatterns(r"\(e\.g\.,? "), ")"),  # "... a valid downloaded model (e.g., a, b)"
    (TextPatterns(r"your models:"), None),  # one name on each line
)
_QUOTED_NAME: Final = TextPatterns(r"['\"`]([^'\"`\n]{1,200})['\"`]")
# A number of 19 digits may be too large for 64 bits. The look-behind keeps the search of a long number from starting
# again at each of its digits.
_NUMBER: Final = r"(?<!\d)(\d{1,18})(?!\d)"
_PROMPT_TOKENS: Final = tuple(
    TextPatterns(pattern)
    for pattern in (
        rf"\bn_prompt_tokens\W+{_NUMBER}",  # llama.cpp's field, in a message that quotes its JSON
        rf"\bn_keep: ?{_NUMBER}",
        rf"\bkeep the first {_NUMBER} tokens",
        rf"\({_NUMBER}(?: tokens)? in (?:the messages|your prompt)",
        rf"{_NUMBER} input tokens",
        rf"{_NUMBER} tokens from the input",
        rf"\b(?:request|input|prompt) (?:has |\((?:(?:total )?length )?){_NUMBER}",
    )
)
_CONTEXT_LENGTH: Final = tuple(
    TextPatterns(pattern)
    for pattern in (
        rf"\bn_ctx\W+{_NUMBER}",
        rf"\bcontext (?:length|size|window)(?: (?:of|is|only|supports))* \(?{_NUMBER}",
        rf"\bmaximum model length of {_NUMBER}",
    )
)

# Hints

_SERVER_HINT: Final = "check that api_base is an OpenAI-compatible server"
_STREAM_HINT: Final = "pass stream=True, because the server streams in any case"
_PATH_HINT: Final = "the server does not know this path; check api_base"
_TLS_HINT: Final = "the server expects TLS; api_base must begin with https://"
_PROXY_LOGIN_HINT: Final = "put a user and a password into the URL of the proxy: http://user:password@host:port"
_PROXY_LOGIN_REQUIRED: Final = 407
_NO_MODEL_HINT: Final = (
    "load a model first: on LM Studio's developer page, with `lms load`, or with the options that start the server"
)
_EVICTED_HINT: Final = (
    "the server dropped the model, perhaps to make room for another model that was requested meanwhile; for a server"
    ' that holds one model, switch model scheduling on with Limits(max_loaded_models=1) or limits="auto"'
)
_HINTS: Final[Mapping[type[LLMError], str]] = {
    LLMAuthenticationError: "pass api_key=, or set LM_API_TOKEN",
    LLMRateLimitError: "send fewer requests at the same time (Limits.max_concurrency), or wait",
    ContextLengthExceededError: "shorten the messages, lower max_tokens, or load the model with a longer context",
    ModelLoadError: "see the server's own log; a smaller model or a shorter context needs less memory",
    ModelNotFoundError: "list_models() returns the models that the server has",
}


def report_lost_model(call: Call, error: LLMError) -> None:
    """Informs the scheduler if the error of a call shows that the model is not loaded, or no longer loaded."""
    if isinstance(error, ModelLoadError | ModelMismatchError | ModelChangedDuringExecutionError):
        call.mark_unloaded()
    if isinstance(error, ModelLoadError) and _MODEL_EVICTED.search(error.message):
        call.note_eviction(is_certain=True)
    elif isinstance(error, LLMStreamError) and _MODEL_PROCESS_ENDED.search(error.message):
        call.note_eviction(is_certain=False)


def report_loss(call: Call, status: int, body: bytes) -> None:
    """Does what `report_lost_model` does, for an error reply that no caller gets, because another server is asked.

    The transport calls this function as the `report_loss` of a request.
    """
    report_lost_model(call, error_from_reply(Reply(call=call, status=status, headers={}, body=body), unredacted))


# Deciding


def classify(status: int, _headers: Mapping[str, str], body: bytes) -> Verdict:
    """Decides whether a request that was answered with an HTTP error is sent again.

    The transport calls this function as the `classify` of a request.
    """
    error_body = parse_error_body(body)
    text = error_body.searched_text
    if _NO_MODEL_LOADED.search(text):
        return Verdict.FAIL
    if status == 503 and _STILL_LOADING.search(text) and not _NO_LONGER_LOADING.search(text):
        return Verdict.POLL
    if status in (408, 429, 502, 503, 504):
        return Verdict.RETRY
    if status == 500 and error_class(error_body, status) is None and not _is_request_mistake(error_body):
        return Verdict.RETRY
    return Verdict.FAIL


def concerns_server(status: int, body: bytes) -> bool:
    """Decides whether an error concerns the server and not the request, so that another server may answer the request.

    That is so if the server does not have the model, cannot load it, has unloaded it, or does not accept the key. The
    transport calls this function as the `concerns_server` of a request.
    """
    kind = error_class(parse_error_body(body), status)
    return kind in (ModelNotFoundError, ModelLoadError, LLMAuthenticationError)


def _is_request_mistake(error_body: ErrorBody) -> bool:
    return bool(error_body.quotes_request or _REQUEST_MISTAKE.search(error_body.searched_text))


def error_class(error_body: ErrorBody, status: int | None) -> type[LLMError] | None:
    """Returns the class of an error by its status and its body, or None if neither names a known cause.

    Args:
        error_body: The parsed body.
        status: The HTTP status, or None for an error inside a stream.
    """
    code = status if status is not None and status >= 400 else error_body.code
    if code in (401, 403) or _AUTHENTICATION.search(error_body.type_and_code):
        return LLMAuthenticationError
    if code == 429 or _RATE_LIMIT.search(error_body.type_and_code):
        return LLMRateLimitError
    text = error_body.searched_text
    return next((kind for patterns, kind in _ERROR_CLASSES if patterns.search(text)), None)


_ERROR_CLASSES: Final[tuple[tuple[TextPatterns, type[LLMError]], ...]] = (
    (_CONTEXT_EXCEEDED, ContextLengthExceededError),
    (_NO_MODEL_LOADED, ModelLoadError),
    (_MODEL_EVICTED, ModelLoadError),
    (_MODEL_LOAD_FAILED, ModelLoadError),
    (_MODEL_NOT_FOUND, ModelNotFoundError),
)
"""The class of an error for each group of patterns. The first group that matches decides."""


# Making errors


def error_from_reply(reply: Reply, redact: Redact) -> LLMError:
    """Returns the error for a plain reply that reports a failure or has an unexpected shape."""
    error_body = parse_error_body(reply.body, redact)
    details = ErrorDetails(context=reply.call.context(), status=reply.status)
    if 300 <= reply.status < 400:
        return redirect_error(reply, redact, {**details, "body": error_body.text})
    kind = error_class(error_body, reply.status) or LLMResponseError
    # A stream that the caller has asked for never becomes a `Reply`, so the caller has not asked for this one.
    if reply.status < 300 and kind is LLMResponseError and begins_event_stream(reply.body):
        details = {**details, "hint": _STREAM_HINT, "body": error_body.text}
        text = excerpt(error_body.message, error_body.size)
        return LLMResponseError(f"the server answered {reply.status} with an event stream: {text}", **details)
    sender = "proxy" if reply.status == _PROXY_LOGIN_REQUIRED else "server"
    message = f"the {sender} answered {reply.status}{_describe_body(error_body, reply.status, kind)}"
    error = _make_error(kind, message, error_body, details)
    if isinstance(error, LLMResponseError):
        error.retry_after = reply.retry_after
    return error


def error_from_event(error_body: ErrorBody, context: Mapping[str, Any], *, is_broken_json: bool = False) -> LLMError:
    """Returns the error for an event, or for plain text, that ends a stream.

    Args:
        error_body: What the server sent.
        context: The context of the request.
        is_broken_json: Whether `error_body` is an event that was damaged on its way, and not the report of an error.
    """
    kind = error_class(error_body, None) or LLMStreamError
    reason = (
        f": {excerpt(error_body.message, error_body.size)}" if error_body.message else " with an error that has no text"
    )
    happened = "the server sent an event that is not valid JSON" if is_broken_json else "the server ended the stream"
    return _make_error(kind, f"{happened}{reason}", error_body, ErrorDetails(context=context))


def _describe_body(error_body: ErrorBody, status: int, kind: type[LLMError]) -> str:
    text = excerpt(error_body.message, error_body.size)
    if not text:
        return " with an empty body"
    if status >= 300:
        return f": {text}"
    if error_body.is_text and kind is LLMResponseError:
        return f" with something that is neither a JSON object nor an event stream: {text}"
    return f", but with an error: {text}"


def _make_error(kind: type[LLMError], message: str, error_body: ErrorBody, details: ErrorDetails) -> LLMError:
    details = {**details, "body": error_body.text, "hint": _hint(kind, error_body, details.get("status"))}
    if kind is ModelNotFoundError:
        asked = (details.get("context") or {}).get("model")
        if asked is None and (quoted := _QUOTED_NAME.search(error_body.searched_message)):
            asked = quoted[1]
        return ModelNotFoundError(asked, _models_listed_in(error_body), **details)
    if kind is ContextLengthExceededError:
        prompt, length = _token_counts(error_body)
        return ContextLengthExceededError(message, prompt_tokens=prompt, context_length=length, **details)
    return kind(message, **details)


def _hint(kind: type[LLMError], error_body: ErrorBody, status: int | None) -> str | None:
    if kind is ModelLoadError:
        if _MODEL_EVICTED.search(error_body.searched_text):
            return _EVICTED_HINT
        if _NO_MODEL_LOADED.search(error_body.searched_text):
            return _NO_MODEL_HINT
    return _HINTS[kind] if kind in _HINTS else _hint_for_other_error(error_body, status)


def _hint_for_other_error(error_body: ErrorBody, status: int | None) -> str | None:
    """Returns the hint for an error whose class says nothing about its cause."""
    text = error_body.searched_message
    if status == _PROXY_LOGIN_REQUIRED:
        return _PROXY_LOGIN_HINT
    if _TLS_EXPECTED.search(text):
        return _TLS_HINT
    has_no_message = not text or error_body.is_html_page
    if _UNKNOWN_PATH.search(text) or (status in (404, 405) and has_no_message):
        return _PATH_HINT
    if status is not None and status < 300 and error_body.is_text:
        return _SERVER_HINT
    return None


def _models_listed_in(error_body: ErrorBody) -> list[str]:
    """Returns the names of the models that a server lists in its message."""
    for beginning, end in _MODEL_LISTS:
        if found := beginning.search(error_body.message):
            listed, end_found, _ = error_body.message[found.end() :].partition(end or "\0")
            names = [name.strip(" -*\t\r") for name in re.split(r"[,\n]", listed)]
            if not end_found and (end or error_body.size):
                # The message was cut off, perhaps in the middle of a name.
                del names[-1]
            return [name for name in names if name and name != "..."]
    return []


def _token_counts(error_body: ErrorBody) -> tuple[int | None, int | None]:
    """Returns the tokens of the prompt and of the context, from llama.cpp's fields or from the text of the message."""
    prompt, length = error_body.fields.get("n_prompt_tokens"), error_body.fields.get("n_ctx")
    text = error_body.searched_message
    return (
        prompt if isinstance(prompt, int) else _first_number(_PROMPT_TOKENS, text),
        length if isinstance(length, int) else _first_number(_CONTEXT_LENGTH, text),
    )


def _first_number(groups: tuple[TextPatterns, ...], text: str) -> int | None:
    found = next(filter(None, (patterns.search(text) for patterns in groups)), None)
    return int(found[1]) if found else None
