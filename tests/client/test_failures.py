"""Errors of servers: their wordings, the error that each becomes, and texts that must not be taken for errors."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs
import pytest

from lmbridge import (
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMClient,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    Timeouts,
    collect,
)
from lmbridge.client import failures
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.error_body import parse_error_body
from lmbridge.testing import Behaviour, ScriptedServer, answer, reply, sse
from lmbridge.transport import Verdict
from tests.client.error_texts import ALARMING_TEXTS, Body, openai_error
from tests.support import MESSAGES, piece, text_of

POLL, RETRY, FAIL = Verdict.POLL, Verdict.RETRY, Verdict.FAIL


@attrs.frozen
class Wording:
    """The wording of an error, and the error that it must become."""

    status: int
    body: Body
    kind: type[LLMError] = LLMResponseError
    hint: str | None = None
    """A part of the expected hint, or None if no hint is expected."""
    verdict: Verdict = FAIL
    by_status: bool = False
    """Whether the status alone decides the class, so that the same text in a stream is an `LLMStreamError`."""
    attributes: dict[str, Any] = attrs.field(factory=dict)

    @property
    def text(self) -> str:
        return self.body if isinstance(self.body, str) else json.dumps(self.body)

    @property
    def kind_in_stream(self) -> type[LLMError]:
        return LLMStreamError if self.by_status or self.kind is LLMResponseError else self.kind


def overflow(body: Body, prompt: int | None, length: int | None, status: int = 400) -> Wording:
    tokens = {"prompt_tokens": prompt, "context_length": length}
    return Wording(status, body, ContextLengthExceededError, "shorten the messages", attributes=tokens)


def not_found(body: Body, available: Iterable[str] = (), status: int = 400) -> Wording:
    named = {"model_name": "test-model", "available_models": list(available)}
    return Wording(status, body, ModelNotFoundError, "list_models()", attributes=named)


def not_loaded(body: Body, hint: str = "see the server's own log", status: int = 400) -> Wording:
    return Wording(status, body, ModelLoadError, hint)


LOAD_FIRST_HINT: Final = "load a model first: on LM Studio's developer page, with `lms load`, or with the options"
EVICTED_HINT: Final = "to make room for another model that was requested meanwhile"
N_CTX: Final = {"type": "exceed_context_size_error", "n_prompt_tokens": 40536, "n_ctx": 32768}

WORDINGS: Final = {
    # LM Studio
    "bad parameter": Wording(400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}),
    "bad tool choice": Wording(400, {"error": "Invalid tool_choice type: 'object'. Supported: none, auto, required"}),
    "bad messages": Wording(400, {"error": "Invalid 'messages' in payload"}),
    "bad image": Wording(400, {"error": "'url' field must be a base64 encoded image."}),
    "zod": Wording(400, openai_error("Required", "invalid_request_error", "invalid_type", param="tools.0.name")),
    "identifier": not_found(
        openai_error(
            'Invalid model identifier "x". Please specify a valid downloaded model (e.g., a/b, c@q4_k_m, d-2).'
        ),
        ["a/b", "c@q4_k_m", "d-2"],
    ),
    "your models": not_found(
        openai_error(
            'Model "x" not found. Please specify a valid model.\n\nYour models:\n\na/b\n  c:2\n', code="model_not_found"
        ),
        ["a/b", "c:2"],
        status=404,
    ),
    "code alone": not_found(openai_error("It is not there.", code="model_not_found"), status=404),
    "not there": not_found({"error": "Model not found"}, status=404),
    "no models": not_loaded(
        {"error": "No models loaded. Please load a model in the developer page or use the 'lms load' command."},
        LOAD_FIRST_HINT,
    ),
    "no models, as an object": not_loaded(
        openai_error("No models loaded. Please load a model."), LOAD_FIRST_HINT, status=404
    ),
    "no token": Wording(
        401,
        openai_error("An LM Studio API token is required to make requests.", "invalid_request", "invalid_api_key"),
        LLMAuthenticationError,
        "pass api_key=, or set LM_API_TOKEN",
    ),
    "unexpected endpoint": Wording(
        200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}, hint="check api_base"
    ),
    "compute": Wording(200, {"error": {"message": "Compute error."}, "message": "Compute error."}),
    "n_keep": overflow(
        {
            "error": "The number of tokens to keep from the initial prompt is greater than the context length (n_keep:"
            " 5228>= n_ctx: 4096). Try to load the model with a larger context length, or provide a shorter input"
        },
        5228,
        4096,
    ),
    "the overflows": overflow(
        {
            "error": "<LM Studio error> Trying to keep the first 15857 tokens when context the overflows. However, the"
            " model is loaded with context length of only 4096 tokens, which is not enough. Try to load the model with"
            " a larger context length, or provide a shorter input. Error Data: n/a, Additional Data: n/a"
        },
        15857,
        4096,
    ),
    "reached": overflow(
        {
            "error": "Reached context length of 4096 tokens with model (arch: gpt-oss) that does not currently support"
            " mid-generation context overflow. Try reloading with a larger context length."
        },
        None,
        4096,
    ),
    "exceeded": overflow({"error": "Context size has been exceeded."}, None, None, status=500),
    "mlx": overflow(
        {
            "error": "Input does not fit in context length. The input has 359277 tokens, but the context length only"
            " supports 262144 tokens.. Error Data: n/a, Additional Data: n/a"
        },
        359277,
        262144,
    ),
    "engine protocol, context": overflow(
        {"error": f"Engine protocol predict request returned 400: {json.dumps({'error': N_CTX})}. Error Data: n/a"},
        40536,
        32768,
    ),
    "engine protocol": Wording(
        500, {"error": 'Engine protocol predict stream returned an error: {"code":500,"message":"?"}'}, verdict=RETRY
    ),
    "resources": not_loaded(
        {
            "error": "Model loading was stopped due to insufficient system resources. Under the current settings, this"
            " model requires approximately 273.25 GB of memory"
        }
    ),
    "resources, older": not_loaded(openai_error("Model loading aborted due to insufficient system resources.")),
    "load": not_loaded({"error": 'Failed to load model "qwen/qwen3-coder-30b". Error: Operation canceled.'}),
    "resources, short": not_loaded({"error": "insufficient system resources"}),
    "loading failed": not_loaded({"error": "Model loading failed."}),
    "load, bare": not_loaded(openai_error("Failed to load model"), status=500),
    "load, exit code": not_loaded({"error": "Error loading model. (Exit code: 18446744072635812000)."}, status=500),
    "load, code": not_loaded(openai_error("SIGABRT", "internal_error", "model_load_failed"), status=500),
    "crash": not_loaded(
        {"error": "The model has crashed without additional information. (Exit code: null). Error Data: n/a"}
    ),
    "crash, short": not_loaded({"error": "model crashed"}, status=500),
    "crash, older": not_loaded(
        {"error": "<LM Studio error> Unknown exception during inferencing.. Error Data: n/a, Additional Data: n/a"}
    ),
    "unloaded": not_loaded({"error": "Model unloaded."}, EVICTED_HINT),
    "is unloaded": not_loaded(openai_error("Model is unloaded."), EVICTED_HINT, status=500),
    "template": Wording(
        400, {"error": "Error rendering prompt with jinja template: ... Error Data: n/a, Additional Data: n/a"}
    ),
    # llama.cpp; the captures have its other errors
    "router, not found": not_found(openai_error("model 'no-such' not found", code=400)),
    "router, not loaded": not_loaded(openai_error("model is not loaded", code=400), LOAD_FIRST_HINT),
    "router, broken": not_loaded(openai_error("model name=broken failed to load", "server_error", 500), status=500),
    "context": overflow(openai_error("the request exceeds the available context size, try increasing it"), None, None),
    "context, text alone": overflow(
        openai_error("request (40031 tokens) exceeds the available context size (2048 tokens), try increasing it"),
        40031,
        2048,
    ),
    "context, fields": overflow({"error": {"message": "no", **N_CTX}}, 40536, 32768),
    "context, wrapped": overflow(json.dumps({"error": {"message": "no", **N_CTX}, "status": 400}), 40536, 32768),
    "generating": overflow(
        openai_error("Context size has been exceeded.", "server_error", 500), None, None, status=500
    ),
    # Ollama
    "ollama": not_found(openai_error('model "x" not found, try pulling it first', "api_error"), status=404),
    "ollama, native": not_found({"error": "model 'x:7b' not found"}, status=404),
    "ollama, memory": not_loaded(
        openai_error("model requires more system memory (5.3 GiB) than is available (3.3 GiB)", "api_error"), status=500
    ),
    "ollama, runner": not_loaded(
        openai_error("llama runner process has terminated: exit status 2", "api_error"), status=500
    ),
    "ollama, stopped": not_loaded(
        openai_error("model runner has unexpectedly stopped, this may be due to resource limitations"), status=500
    ),
    "ollama, blob": not_loaded(openai_error("unable to load model: blobs/sha256-1234", "api_error"), status=500),
    "ollama, context": overflow(openai_error("the input length exceeds the context length", "api_error"), None, None),
    "ollama, path": Wording(404, "404 page not found", hint="check api_base"),
    "ollama, full": Wording(
        503,
        openai_error("server busy, please try again. maximum pending requests exceeded", "api_error"),
        verdict=RETRY,
    ),
    # vLLM
    "vllm, older": not_found(
        {
            "object": "error",
            "message": "The model `x` does not exist.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        },
        status=404,
    ),
    "vllm": not_found(openai_error("The model `x` does not exist.", "NotFoundError", 404), status=404),
    "vllm, no key": Wording(401, {"error": "Unauthorized"}, LLMAuthenticationError, "pass api_key=", by_status=True),
    "vllm, context": overflow(
        openai_error(
            "This model's maximum context length is 8192 tokens. However, you requested 9500 tokens (9000 in the"
            " messages, 500 in the completion). Please reduce the length of the messages or completion."
        ),
        9000,
        8192,
    ),
    "vllm, max_tokens": overflow(
        openai_error(
            "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is 32768"
            " tokens and your request has 1200 input tokens (32000 > 32768 - 1200)."
        ),
        1200,
        32768,
    ),
    "vllm, newer": overflow(
        openai_error(
            "This model's maximum context length is 8192 tokens. However, you requested 500 output tokens and your"
            " prompt contains at least 9001 input tokens, for a total of at least 9501 tokens."
        ),
        9001,
        8192,
    ),
    "vllm, prompt": overflow(
        openai_error("The decoder prompt (length 17772) is longer than the maximum model length of 16384."),
        17772,
        16384,
    ),
    "vllm, too long": overflow(
        openai_error("The prompt (total length 25938) is too long to fit into the model (context length 4096)."),
        25938,
        4096,
    ),
    "vllm, memory": not_loaded(
        openai_error("CUDA out of memory. Tried to allocate 2.00 GiB", "InternalServerError"), status=500
    ),
    # Others
    "openai, path": Wording(404, openai_error("Invalid URL (POST /chat/completions)"), hint="check api_base"),
    "express": Wording(404, {"error": "Cannot POST /v1/chat/completions"}, hint="check api_base"),
    "code for the context": overflow(openai_error("It is too long.", code="context_length_exceeded"), None, None),
    "no quotes": not_found({"error": "Model qwen3:8b does not exist"}, status=404),
    "message beside": not_loaded({"error": {"code": 500}, "message": "Model unloaded."}, EVICTED_HINT),
    "openai, context": overflow(openai_error("Your input exceeds the context window of this model."), None, None),
    "sglang": overflow(
        openai_error(
            "Requested token count exceeds the model's maximum context length of 8192 tokens. You requested a total of"
            " 9100 tokens: 9000 tokens from the input messages and 100 tokens for the completion."
        ),
        9000,
        8192,
    ),
    "sglang, input": overflow(
        openai_error("The input (9001 tokens) is longer than the model's context length (8192 tokens)."), 9001, 8192
    ),
    "llama-swap": not_found({"error": "could not find real modelID for x"}),
    "litellm": not_found(
        openai_error("Invalid model name passed in model=x. Call `/v1/models` to view available models")
    ),
    "litellm, code in words": Wording(
        429, openai_error("slow down", "None", "429"), LLMRateLimitError, "Limits.max_concurrency", RETRY
    ),
    "rate": Wording(
        429, {"error": "Too many requests"}, LLMRateLimitError, "Limits.max_concurrency", RETRY, by_status=True
    ),
    "rate, in its type": Wording(
        400, openai_error("slow down", "rate_limit_error"), LLMRateLimitError, "Limits.max_concurrency"
    ),
    "forbidden": Wording(403, {"error": "no"}, LLMAuthenticationError, "set LM_API_TOKEN", by_status=True),
    "fastapi": Wording(404, {"detail": "Not Found"}, hint="check api_base"),
    "fastapi, method": Wording(405, {"detail": "Method Not Allowed"}, hint="check api_base"),
    "fastapi, object": not_found({"detail": {"message": 'model "x" not found'}}),
    "fastapi, list": Wording(422, {"detail": [{"loc": ["body", "model"], "msg": "Field required", "type": "missing"}]}),
    "proxy": Wording(502, "Bad Gateway", verdict=RETRY),
    "proxy, empty": Wording(504, "", verdict=RETRY),
    "guardrails": Wording(400, {"code": 400, "details": "unsuitable content"}),
    "list": Wording(400, {"error": ["no such thing"]}),
    "true": Wording(400, {"error": True, "message": "no such thing"}),
}


def each_wording(wordings: Mapping[str, Wording]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("wording", [pytest.param(wording, id=name) for name, wording in wordings.items()])


async def error_of_request(
    server: ScriptedServer, behaviour: Behaviour, *, stream: bool = False, **options: Any
) -> LLMError:
    """Returns the error of one request without retries; for a stream, the `await` has to raise it."""
    server.script(behaviour)
    # The error for a missing model has no other models then than those in its body.
    server.models = []
    async with LLMClient(server.api_base, "test-model", max_retries=0, **options) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES, stream=stream)
    assert [request.method for request in server.requests if request.path != "/v1/models"] == ["POST"]
    return caught.value


async def error_of_stream(server: ScriptedServer, behaviour: Behaviour, **options: Any) -> tuple[LLMError, list[Any]]:
    """Returns the error that iterating a stream raises, and the chunks before it."""
    server.script(behaviour)
    server.models = []
    chunks: list[Any] = []
    async with LLMClient(server.api_base, "test-model", max_retries=0, **options) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        with pytest.raises(LLMError) as caught:
            await read_into(chunks, stream)
        with pytest.raises(type(caught.value)) as again:
            await anext(stream)
        assert again.value is caught.value
    return caught.value, chunks


async def read_into(chunks: list[Any], stream: ChatStream) -> None:
    async for each in stream:
        chunks.append(each)  # noqa: PERF401 - a comprehension would lose the chunks before the error


def assert_is_expected(error: LLMError, wording: Wording, kind: type[LLMError]) -> None:
    assert type(error) is kind
    assert error.body == wording.text
    assert {name: getattr(error, name) for name in wording.attributes} == wording.attributes
    if wording.hint is None:
        assert error.hint is None
    else:
        assert wording.hint in (error.hint or "")
        assert str(error).endswith(f"; {error.hint}")
    assert error.context["model"] == "test-model"


# Replies


@pytest.mark.parametrize("stream", [False, True])
@each_wording(WORDINGS)
async def test_a_reply_becomes_the_error_that_its_body_names(
    scripted_server: ScriptedServer, wording: Wording, stream: bool
) -> None:
    error = await error_of_request(
        scripted_server, reply(wording.status, wording.text, content_type="application/json"), stream=stream
    )
    assert_is_expected(error, wording, wording.kind)
    assert error.status == wording.status
    assert error.partial is None


@each_wording(WORDINGS)
def test_a_reply_decides_whether_the_request_is_sent_again(wording: Wording) -> None:
    assert failures.classify(wording.status, {}, wording.text.encode()) is wording.verdict


async def test_an_error_quotes_the_message_of_the_server(scripted_server: ScriptedServer) -> None:
    error = await error_of_request(scripted_server, reply(400, {"error": "Invalid 'messages' in payload"}))
    assert error.message == "the server answered 400: Invalid 'messages' in payload"


async def test_an_error_with_status_200_says_so(scripted_server: ScriptedServer) -> None:
    error = await error_of_request(scripted_server, reply(200, {"error": "Invalid 'messages' in payload"}))
    assert error.message == "the server answered 200, but with an error: Invalid 'messages' in payload"


@pytest.mark.parametrize("body", [b"", b" \n", b"\xef\xbb\xbf"])
async def test_an_error_without_a_message_says_so(scripted_server: ScriptedServer, body: bytes) -> None:
    error = await error_of_request(scripted_server, reply(418, body))
    assert error.message == "the server answered 418 with an empty body"
    assert type(error) is LLMResponseError


async def test_a_long_message_is_shortened_and_kept_in_the_body(scripted_server: ScriptedServer) -> None:
    text = "no " * 1000
    error = await error_of_request(scripted_server, reply(400, {"error": text}))
    assert error.message == f"the server answered 400: {text[:500]}... (3000 characters)"
    assert error.body == json.dumps({"error": text}, separators=(",", ":"))


async def test_a_missing_model_that_the_caller_did_not_name_is_taken_from_the_message(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(reply(404, {"error": "model 'tiny' not found"}))
    async with LLMClient(scripted_server.api_base) as client:
        with pytest.raises(ModelNotFoundError, match="model 'tiny' not found") as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.model_name == "tiny"


async def test_the_error_for_a_missing_model_suggests_close_matches(scripted_server: ScriptedServer) -> None:
    text = 'Invalid model identifier "x". Please specify a valid downloaded model (e.g., test-model-2, other, ...).'
    error = await error_of_request(scripted_server, reply(400, openai_error(text)))
    assert "did you mean 'test-model-2'?" in error.message
    assert isinstance(error, ModelNotFoundError)
    assert error.available_models == ["test-model-2", "other"]
    assert "the server has: test-model-2, other" in error.message.lower()


@pytest.mark.parametrize("status", [429, 400])
async def test_the_wait_that_a_server_asks_for_is_in_the_error(scripted_server: ScriptedServer, status: int) -> None:
    error = await error_of_request(scripted_server, reply(status, {"error": "busy"}, {"Retry-After": "17"}))
    assert isinstance(error, LLMResponseError)
    assert error.retry_after == 17


async def test_the_page_of_a_redirect_does_not_decide_the_error(scripted_server: ScriptedServer) -> None:
    error = await error_of_request(
        scripted_server, reply(307, "model 'x' not found", {"Location": "http://user:pass@other/v1?key=secret"})
    )
    assert type(error) is LLMResponseError
    assert error.message == "the server redirects (307) to http://other/v1"
    assert "redirects are not followed" in (error.hint or "")
    assert (error.status, error.body) == (307, "model 'x' not found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        reply(401, openai_error("Incorrect API key provided: sk-secret-1")),
        reply(307, "sk-secret-1", {"Location": "http://other/sk-secret-1/v1"}),
        reply(200, {"error": "Incorrect API key provided: sk-secret-1"}),
    ],
)
async def test_a_key_that_the_server_repeats_is_redacted(
    scripted_server: ScriptedServer, behaviour: Behaviour, stream: bool
) -> None:
    error = await error_of_request(scripted_server, behaviour, stream=stream, api_key="sk-secret-1")
    assert "sk-secret" not in f"{error} {error.body} {vars(error)}"
    assert "[api_key]" in str(error)


@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("body", ["", "<html><h1>404 Not Found</h1></html>", '{"error": "Not Found"}'])
async def test_the_error_for_an_unknown_path_suggests_checking_api_base(
    scripted_server: ScriptedServer, status: int, body: str
) -> None:
    error = await error_of_request(scripted_server, reply(status, body))
    assert type(error) is LLMResponseError
    assert error.hint == "the server does not know this path; check api_base"


# Retries


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(408, RETRY), (429, RETRY), (500, RETRY), (502, RETRY), (503, RETRY), (504, RETRY)]
    + [(status, FAIL) for status in (400, 401, 403, 404, 405, 409, 413, 418, 422, 425, 501, 505, 529)],
)
@pytest.mark.parametrize(
    "body", [b"", b'{"error": "try later"}', b"<html>Loading...</html>", b'{"error": {}}', b"\xff"]
)
def test_the_status_decides_if_the_body_says_nothing(status: int, verdict: Verdict, body: bytes) -> None:
    assert failures.classify(status, {}, body) is verdict


LOADING: Final = (
    openai_error("Loading model", "unavailable_error", 503),  # llama.cpp
    {"message": "Loading model", "type": "unavailable_error", "code": 503},
    {"error": "Model meta-llama/Llama-2-70b-chat is currently loading", "estimated_time": 20.0},  # Hugging Face
    {"error": "loading"},
    {"status": "loading model"},
    "model is still loading, please wait",
)


@pytest.mark.parametrize("body", LOADING)
def test_a_503_that_says_loading_is_polled(body: Body) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    assert failures.classify(503, {}, text.encode()) is POLL


@pytest.mark.parametrize("body", LOADING)
@pytest.mark.parametrize("status", [400, 404, 408, 409, 429, 500, 502, 504])
def test_other_statuses_are_not_polled(status: int, body: Body) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    assert failures.classify(status, {}, text.encode()) is not POLL


@pytest.mark.parametrize(
    "text",
    [
        "Error loading model. (Exit code: 1)",
        "Model loading was stopped due to insufficient system resources",
        "Model loading failed",
        "Loading of the model has failed",
        "Failed to load model while loading its tensors",
        "Failure while loading weights",
        "the model is downloading",
        '<!DOCTYPE html><title>503</title><img loading="lazy">',
        "<html><body>Loading...</body></html>",
        "uploading is off",
    ],
)
def test_a_failed_load_and_an_html_page_are_not_polled(text: str) -> None:
    assert failures.classify(503, {}, text.encode()) is RETRY
    assert failures.classify(503, {}, json.dumps({"error": text}).encode()) is RETRY


@pytest.mark.parametrize("status", [400, 404, 408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("text", ["No models loaded. Please load a model", "no model is currently loaded"])
def test_a_request_is_not_sent_again_if_no_model_is_loaded(status: int, text: str) -> None:
    assert failures.classify(status, {}, json.dumps({"error": text}).encode()) is FAIL


async def test_a_loading_server_is_polled_until_it_answers(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.script(*[reply(503, openai_error("Loading model", "unavailable_error", 503))] * 4, answer("Hi"))
    async with LLMClient(scripted_server.api_base, max_retries=0, timeout=Timeouts(load=60)) as client:
        whole = await client.chat_completion(MESSAGES)
    assert whole["choices"][0]["message"]["content"] == "Hi"
    assert len(scripted_server.requests) == 5


@pytest.mark.parametrize(
    "text",
    [
        "Failed to parse tools: Missing tool function: {}",
        "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error at line 1, column 9",
        "Failed to parse messages: Missing 'content'",
        "[json.exception.type_error.302] type must be number, but is string",
        "failed to parse grammar",
        "Cannot use custom grammar constraints with tools.",
        "Jinja Exception: what now?",
        "Unrecognized schema: {}",
        "JSON schema error at #: unrecognized type frobnicate",
        "JSON schema conversion failed:\nUnrecognized schema: {}",
        "Error resolving ref #/$defs/x: $defs not in {}: invalid request",
        "Unable to generate parser for this template. Automatic parser generation failed",
        "\n------------\nWhile executing CallExpression at line 1\nError: Jinja Exception: roles must alternate",
        "System message must be at the beginning. at row 12, column 9",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "No user query found in messages.",
        "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
        "audio input is not supported",
        "input is too large to process. increase the physical batch size",
        "The model produced output that does not match the expected peg-native format",
        "1 validation error:\n  {'type': 'float_parsing'}",
        "Tool with name 'zzz' not found in tools",
        'can only concatenate str (not "list") to str',
        "Expected 'content' to be a string or an array, got null",
        "template: :3:12: executing",
    ],
)
def test_a_500_about_a_mistake_in_the_request_is_not_retried(text: str) -> None:
    body = json.dumps(openai_error(text, "server_error", 500)).encode()
    assert failures.classify(500, {}, body) is FAIL
    assert failures.classify(503, {}, body) is RETRY
    assert failures.error_class(parse_error_body(body.decode()), 500) is None


def test_a_500_whose_type_is_a_mistake_in_the_request_is_not_retried() -> None:
    assert failures.classify(500, {}, json.dumps(openai_error("no", "invalid_request_error")).encode()) is FAIL
    assert failures.classify(500, {}, json.dumps(openai_error("no", "server_error")).encode()) is RETRY


# Texts that are not errors


@pytest.mark.parametrize("text", ALARMING_TEXTS)
async def test_a_reply_that_talks_about_errors_is_not_an_error(
    scripted_server: ScriptedServer, client: LLMClient, text: str
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "error", "arguments": json.dumps({"error": text})}}
    extra = {"error": None, "detail": text, "message": text, "stats": {"error": text}}
    scripted_server.default = answer(text, chunks=list(text), tool_calls=[call], reasoning=text, extra=extra)
    whole = await client.chat_completion(MESSAGES)
    message = whole["choices"][0]["message"]
    assert message["content"] == text
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        collected = (await collect(stream))["choices"][0]["message"]
    assert {**collected} == {**message}
    assert collected["reasoning_content"] == text


@pytest.mark.parametrize(
    "chunk",
    [
        piece("Hi", error=None),
        piece("Hi", error={}),
        piece("Hi", error=""),
        piece("Hi", error=False),
        {**piece("Hi"), "message": "fine", "detail": "fine", "type": "chunk", "code": 200},
    ],
)
async def test_a_chunk_with_an_empty_error_field_is_a_chunk(
    scripted_server: ScriptedServer, client: LLMClient, chunk: dict[str, Any]
) -> None:
    scripted_server.script(sse(chunk, piece(finish_reason="stop"), done=True))
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        assert [text_of(each) async for each in stream] == ["Hi", ""]


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' must be at least 1, got 0.",
        "max_tokens must not exceed the context length",
        "num_ctx cannot exceed the model's maximum context window",
        "'temperature' must be between 0 and 2",
        "Unknown parameter: 'context_length'",
        "'model' is required",
        "model name is missing from the request",
        "Missing required parameter: 'model'",
        "the model parameter must be a string, not found",
        "the parameter 'top_k' of this model does not exist",
        "'model' does not exist in the request",
        "the chat template of the model was not found",
        "model template not found",
        "tool 'search' not found",
        "Tool with name 'zzz' not found in tools",
        "the model called a tool that does not exist",
        "File Not Found",
        "Previous response with id 'resp_1' not found.",
        "Failed to load image: not a PNG",
        "the model cannot read images: failed to load image",
        "Invalid value for 'logit_bias': 'loading' is no token",
        "does not support tools",
        "'n_ctx' is not a parameter of this endpoint",
        "JSON schema error at #: cannot resolve $ref #/nope, nope not found",
        "stop: too many",
    ],
)
@pytest.mark.parametrize("as_object", [True, False])
async def test_an_error_about_a_parameter_is_not_taken_for_another_error(
    scripted_server: ScriptedServer, message: str, as_object: bool
) -> None:
    body = openai_error(message) if as_object else {"error": message}
    error = await error_of_request(scripted_server, reply(400, body))
    assert type(error) is LLMResponseError
    assert error.message == f"the server answered 400: {message}"
    assert failures.classify(400, {}, json.dumps(body).encode()) is FAIL


@pytest.mark.parametrize("text", ALARMING_TEXTS)
@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_quoted_request_does_not_decide_the_error(text: str, status: int) -> None:
    bodies: list[Body] = [
        openai_error(f"Failed to parse tools: Missing tool function; tools = {json.dumps([text])}"),
        openai_error(f"Failed to parse messages: Missing 'role'; messages = {json.dumps([text])}"),
        openai_error(
            f"7 validation errors:\n  {{'type': 'literal_error', 'loc': ('body', 'messages', 0), 'input': {text!r}}}"
        ),
        openai_error(
            f"[{{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required', 'input': {text!r}}}]"
        ),
        {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required", "input": text}]},
    ]
    for body in bodies:
        error_body = parse_error_body(json.dumps(body))
        assert failures.error_class(error_body, status) is None
        assert failures.classify(status, {}, error_body.text.encode()) in (FAIL, RETRY)


@pytest.mark.parametrize("text", ALARMING_TEXTS)
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_an_html_page_does_not_decide_the_error(scripted_server: ScriptedServer, text: str, status: int) -> None:
    page = f"\n<!DOCTYPE html><html><title>Oops</title><p>{text}</p></html>"
    for stream in (False, True):
        scripted_server.requests.clear()
        error = await error_of_request(scripted_server, reply(status, page, content_type="text/html"), stream=stream)
        assert type(error) is LLMResponseError
        assert "Oops" in error.message
        assert error.body == page


@pytest.mark.parametrize("text", ALARMING_TEXTS)
async def test_a_chunk_that_was_cut_off_does_not_decide_the_error(scripted_server: ScriptedServer, text: str) -> None:
    half = json.dumps(piece(text))[:-3]
    error, chunks = await error_of_stream(
        scripted_server, sse(piece("Hi"), f"data: {half}\n\n", piece("there"), done=True)
    )
    assert type(error) is LLMStreamError
    assert [text_of(each) for each in chunks] == ["Hi"]
    assert error.body == half


@pytest.mark.parametrize("text", ALARMING_TEXTS)
@pytest.mark.parametrize("end", [None, -3])
async def test_a_completion_in_place_of_a_stream_does_not_decide_the_error(
    scripted_server: ScriptedServer, text: str, end: int | None
) -> None:
    whole = {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}], "error": None}
    body = json.dumps(whole)[:end]
    error = await error_of_request(scripted_server, reply(200, body, content_type="application/json"), stream=True)
    assert type(error) is LLMResponseError
    assert error.body == body


# Errors in a stream


@pytest.mark.parametrize("before", [(), ("Hel", "lo")], ids=["at once", "after some text"])
@each_wording({name: wording for name, wording in WORDINGS.items() if wording.text})
async def test_an_event_becomes_the_error_that_its_text_names(
    scripted_server: ScriptedServer, wording: Wording, before: tuple[str, ...]
) -> None:
    event = "".join(f"data: {line}\n" for line in wording.text.split("\n"))
    error, chunks = await error_of_stream(scripted_server, sse(*map(piece, before), f"{event}\n", done=True))
    kind = wording.kind_in_stream
    assert_is_expected(error, wording if kind is wording.kind else attrs.evolve(wording, hint=error.hint), kind)
    assert [text_of(each) for each in chunks] == list(before)
    assert error.status == 200
    if before:
        assert error.partial["choices"][0]["message"]["content"] == "Hello"
        assert error.partial["choices"][0]["finish_reason"] is None
    else:
        assert error.partial is None


SHAPES: Final[dict[str, tuple[str, type[LLMError], str, str]]] = {
    # The bytes of the events, the class of the error, its message, its body.
    "object": ('data: {"error": {"message": "no"}}\n\n', LLMStreamError, "no", '{"error": {"message": "no"}}'),
    "object with a code": ('data: {"error": {"code": 401, "message": "no"}}\n\n', LLMAuthenticationError, "no", ""),
    "object with 429": ('data: {"error": {"code": 429, "message": "no"}}\n\n', LLMRateLimitError, "no", ""),
    "object with a type": (
        'data: {"error": {"type": "authentication_error", "message": "no"}}\n\n',
        LLMAuthenticationError,
        "no",
        "",
    ),
    "string": ('data: {"error": "model crashed"}\n\n', ModelLoadError, "model crashed", '{"error": "model crashed"}'),
    "empty object": ('data: {"error": {}}\n\n', LLMStreamError, '{"error": {}}', '{"error": {}}'),
    "empty string": ('data: {"error": ""}\n\n', LLMStreamError, '{"error": ""}', '{"error": ""}'),
    "true": ('data: {"error": true, "message": "no"}\n\n', LLMStreamError, "no", ""),
    "list": ('data: {"error": ["no"]}\n\n', LLMStreamError, '["no"]', ""),
    "LM Studio": (
        'data: {"error":{"message":"Compute error."},"message":"Compute error."}\n\n',
        LLMStreamError,
        "Compute error.",
        "",
    ),
    "vLLM, older": ('data: {"object":"error","message":"no","type":"X","code":400}\n\n', LLMStreamError, "no", ""),
    "message": ('data: {"message": "Model unloaded."}\n\n', ModelLoadError, "Model unloaded.", ""),
    "detail": ('data: {"detail": "no"}\n\n', LLMStreamError, "no", '{"detail": "no"}'),
    "event": ('event: error\ndata: {"code": 400, "details": "no"}\n\n', LLMStreamError, "no", ""),
    "event, unknown fields": ('event: error\ndata: {"a": 1}\n\n', LLMStreamError, '{"a": 1}', '{"a": 1}'),
    "event with an error": (
        'event: error\ndata: {"error": "Model unloaded."}\n\n',
        ModelLoadError,
        "Model unloaded.",
        "",
    ),
    "event, bare text": ("event: error\ndata: model crashed\n\n", ModelLoadError, "model crashed", "model crashed"),
    "event, a chunk": ('event: error\ndata: {"choices": []}\n\n', LLMStreamError, '{"choices": []}', ""),
    "event, lines": (
        "event: error\ndata: model\ndata: crashed\n\n",
        LLMStreamError,
        "model\ncrashed",
        "model\ncrashed",
    ),
    "other event": ('event: oops\ndata: {"error": "no"}\n\n', LLMStreamError, "no", '{"error": "no"}'),
    "bare text": ("data: Internal Server Error\n\n", LLMStreamError, "Internal Server Error", "Internal Server Error"),
    "JSON string": ('data: "model crashed"\n\n', ModelLoadError, "model crashed", '"model crashed"'),
    "JSON number": ("data: 7\n\n", LLMStreamError, "7", "7"),
    "JSON list": ('data: [{"choices": []}]\n\n', LLMStreamError, '[{"choices": []}]', '[{"choices": []}]'),
    "beside a choice": (
        'data: {"model":"test-model","choices":[{"index":0,"delta":{"content":""}}],"error":{"message":"no"}}\n\n',
        LLMStreamError,
        "no",
        "",
    ),
    "no space": ('data:{"error":"no"}\r\n\r\n', LLMStreamError, "no", '{"error":"no"}'),
}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("before", [(), ("Hel", "lo")], ids=["at once", "after some text"])
@pytest.mark.parametrize(
    ("event", "kind", "message", "body"), [pytest.param(*shape, id=name) for name, shape in SHAPES.items()]
)
async def test_an_error_in_a_stream_is_never_taken_for_its_end(
    scripted_server: ScriptedServer,
    event: str,
    kind: type[LLMError],
    message: str,
    body: str,
    before: tuple[str, ...],
    done: bool,
) -> None:
    error, chunks = await error_of_stream(scripted_server, sse(*map(piece, before), event, done=done))
    assert type(error) is kind
    assert error.message == f"the server ended the stream: {message}"
    assert error.status == 200
    assert error.body == (body or event.partition("data: ")[2].strip())
    assert [text_of(each) for each in chunks] == list(before)
    assert (error.partial or {}).get("choices", [{}])[0].get("message", {}).get("content") == (
        "Hello" if before else None
    )


@pytest.mark.parametrize("data", ['{"choices": [{"delta": {"content": "model unlo', "[{]"])
async def test_an_event_of_broken_json_is_named_and_is_not_taken_for_the_servers_report(
    scripted_server: ScriptedServer, data: str
) -> None:
    error, _ = await error_of_stream(scripted_server, sse(piece("Hi"), f"data: {data}\n\n", piece(" there")))
    assert type(error) is LLMStreamError
    assert error.message.startswith("the server sent an event that is not valid JSON: ")
    assert error.body == data
    assert error.partial["choices"][0]["message"]["content"] == "Hi"


async def test_lines_that_are_not_events_explain_why_a_stream_was_cut_off(scripted_server: ScriptedServer) -> None:
    error, _ = await error_of_stream(scripted_server, sse(piece("Hi"), "proxy error: Model unloaded."))
    assert type(error) is ModelLoadError
    assert error.message == "the server ended the stream: proxy error: Model unloaded."
    assert error.body == "proxy error: Model unloaded."
    assert error.partial["choices"][0]["message"]["content"] == "Hi"


async def test_pings_are_not_quoted_in_the_error(scripted_server: ScriptedServer) -> None:
    error, _ = await error_of_stream(scripted_server, sse(piece("Hi"), ":\n\n", ": ping\n\n", "id: 1\nretry: 5\n\n"))
    assert type(error) is LLMStreamError
    assert error.message == "the stream was cut off: it ended without [DONE] or a finish reason"
    assert error.body is None


async def test_a_key_that_a_stream_repeats_is_redacted(scripted_server: ScriptedServer) -> None:
    event = 'data: {"error": {"code": 401, "message": "Incorrect API key provided: sk-secret-1"}}\n\n'
    for behaviour in (sse(event), sse(piece("Hi"), event), sse("upstream: sk-secret-1")):
        error, _ = await error_of_stream(scripted_server, behaviour, api_key="sk-secret-1")
        assert "sk-secret" not in f"{error} {error.body} {vars(error)}"
        assert "[api_key]" in str(error)


async def test_an_error_after_the_finish_reason_is_raised(scripted_server: ScriptedServer) -> None:
    error, chunks = await error_of_stream(
        scripted_server,
        sse(piece("Hi"), piece(finish_reason="stop"), 'data: {"error": "Model unloaded."}\n\n', done=True),
    )
    assert type(error) is ModelLoadError
    assert len(chunks) == 2
    assert error.partial["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 9000, "completion_tokens": 0, "total_tokens": 9000}])
async def test_a_stream_without_a_single_delta_raises(
    scripted_server: ScriptedServer, usage: dict[str, int] | None
) -> None:
    # LM Studio answers a prompt that is longer than the context with a regular stream that has no answer.
    empty: dict[str, Any] = {"object": "chat.completion.chunk", "model": "test-model", "choices": [], "usage": usage}
    error, _ = await error_of_stream(scripted_server, sse(empty, piece(finish_reason="stop"), empty, done=True))
    assert type(error) is LLMStreamError
    assert "without any part of an answer" in error.message
    assert "longer than the loaded context" in (error.hint or "")
    assert error.partial["usage"] == usage


# Replies that are not a stream

NO_STREAMS: Final[dict[str, tuple[str, str, type[LLMError], str]]] = {
    # Content-Type, body, class, a part of the message.
    "error object": ("application/json", '{"error": {"message": "no"}}', LLMResponseError, "but with an error: no"),
    "error string": (
        "application/json",
        '{"error": "Model unloaded."}',
        ModelLoadError,
        "with an error: Model unloaded.",
    ),
    "top-level message": ("application/json", '{"message": "no"}', LLMResponseError, "but with an error: no"),
    "bare string": ("application/json", '"Model unloaded."', ModelLoadError, "with an error: Model unloaded."),
    "bare text": ("text/plain", "model 'x' not found", ModelNotFoundError, "model 'test-model' not found"),
    "completion": ("application/json", '{"choices": [{"message": {}}]}', LLMResponseError, "is not an event stream"),
    "no completion": ("application/json", '{"status": "ok"}', LLMResponseError, "is not an event stream"),
    "list": ("application/json", "[]", LLMResponseError, "[]"),
    "page": (
        "text/html",
        "<html><p>Welcome</p></html>",
        LLMResponseError,
        "neither a JSON object nor an event stream: <html><p>",
    ),
    "nothing": ("application/json", "", LLMResponseError, "with an empty body"),
    "nothing, untyped": ("", "", LLMResponseError, "200 with an empty body"),
    "error, untyped": ("", '{"error": "Model unloaded."}', ModelLoadError, "with an error: Model unloaded."),
}


@pytest.mark.parametrize(
    ("content_type", "body", "kind", "message"), [pytest.param(*each, id=name) for name, each in NO_STREAMS.items()]
)
async def test_a_reply_that_is_not_a_stream_is_raised_by_the_await(
    scripted_server: ScriptedServer, content_type: str, body: str, kind: type[LLMError], message: str
) -> None:
    error = await error_of_request(scripted_server, reply(200, body, content_type=content_type), stream=True)
    assert type(error) is kind
    assert message in error.message
    assert (error.status, error.body) == (200, body)
    is_foreign = kind is LLMResponseError and "with an error" not in message
    assert (error.hint == "check that api_base is an OpenAI-compatible server") is is_foreign


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream", ""])
@pytest.mark.parametrize("start", ["", ":\n\n", "event: message\n", "id: 1\n", "retry: 5\n", "\r\n", "\ufeff"])
async def test_a_stream_with_another_content_type_is_a_stream(
    scripted_server: ScriptedServer, client: LLMClient, start: str, content_type: str
) -> None:
    first = f"{start}data: {json.dumps(piece('Hi'))}\n\n"
    scripted_server.script(sse(first, piece(finish_reason="stop"), content_type=content_type, done=True))
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        assert [text_of(each) async for each in stream] == ["Hi", ""]


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
async def test_an_error_in_a_stream_with_any_content_type_is_raised(
    scripted_server: ScriptedServer, content_type: str
) -> None:
    error, _ = await error_of_stream(
        scripted_server, sse('data: {"error": "Model unloaded."}\n\n', content_type=content_type, done=True)
    )
    assert type(error) is ModelLoadError


@pytest.mark.parametrize("body", ["{}", '{"error": "Model unloaded."}', "Model unloaded.", '"Model unloaded."'])
async def test_json_with_the_content_type_of_a_stream_is_not_a_reply(
    scripted_server: ScriptedServer, body: str
) -> None:
    error, chunks = await error_of_stream(scripted_server, sse(body))
    assert isinstance(error, LLMStreamError | ModelLoadError)
    assert isinstance(error, ModelLoadError) == ("Model" in body)
    assert chunks == []
    assert error.body == body


# Replies that are not a completion


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "200 with an empty body"),
        (b"Hello", "neither a JSON object nor an event stream: Hello"),
        (b"<html></html>", "neither a JSON object nor an event stream: <html></html>"),
        (b'{"choices": [{"mess', "neither a JSON object nor an event stream"),
        (b"[]", "neither a JSON object nor an event stream: []"),
        (b"null", "neither a JSON object nor an event stream: null"),
        (b'"Hello"', "neither a JSON object nor an event stream: Hello"),
        (b"{}", "something that is not a chat completion: '{}'"),
        (b'{"choices": []}', "something that is not a chat completion"),
        (b'{"choices": null}', "something that is not a chat completion"),
        (b'{"choices": [], "usage": {"prompt_tokens": 9}}', "something that is not a chat completion"),
        (b'{"status": "ok"}', "something that is not a chat completion"),
    ],
)
async def test_a_reply_that_is_not_a_completion_raises(
    scripted_server: ScriptedServer, body: bytes, message: str
) -> None:
    error = await error_of_request(scripted_server, reply(200, body, content_type="application/json"))
    assert type(error) is LLMResponseError
    assert message in error.message
    assert "check that api_base is an OpenAI-compatible server" in (error.hint or "")
    assert (error.status, error.body) == (200, body.decode())


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
@pytest.mark.parametrize("start", ["", "event: response.created\n", "\ufeff\r\n: ping\n\n"])
async def test_a_stream_that_nobody_asked_for_is_called_by_its_name(
    scripted_server: ScriptedServer, start: str, content_type: str
) -> None:
    body = f'{start}data: {{"choices": []}}\n\n'
    error = await error_of_request(scripted_server, reply(200, body, content_type=content_type))
    assert type(error) is LLMResponseError
    assert error.message.startswith("the server answered 200 with an event stream: ")
    assert error.hint == "pass stream=True, because the server streams in any case"
    assert (error.status, error.body) == (200, body)


# Names of models

FITTING_NAMES: Final = [
    ("test-model", "test-model"),
    ("test-model", "test-model:2"),
    ("test-model", "test-model@q4_k_m"),
    ("test-model", "test-model@q4_k_m:2"),
    ("qwen3:8b", "qwen3:8b"),
    ("qwen3:8b", "qwen3:8b:2"),
    ("test-model", ""),
    ("test-model", None),
    (None, "anything"),
]
MISMATCHED_NAMES: Final = [
    ("test-model", "other"),
    ("test-model", "test-model-2"),
    ("test-model", "test-model:latest"),
    ("test-model:2", "test-model"),
    ("test-model@q4", "test-model@q8"),
    ("qwen3:8b", "qwen3:14b"),
    ("qwen3:8", "qwen3:80"),
    ("qwen3", "qwen3:8b"),
    ("Test-Model", "test-model"),
    ("a/test-model", "test-model"),
]


async def reply_of_model(
    server: ScriptedServer, asked: str | None, name: str | None, mode: Any, *, stream: bool
) -> Any:
    """Returns the whole reply of a model that reports this name."""
    server.script(answer("Hi", extra={"model": name}))
    async with LLMClient(server.api_base, asked, model_mismatch=mode) as client:
        whole: Any = await client.chat_completion(MESSAGES, stream=stream)
        return await collect(whole) if stream else whole


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "name"), FITTING_NAMES)
async def test_a_fitting_name_is_not_a_mismatch(
    scripted_server: ScriptedServer, asked: str | None, name: str | None, stream: bool
) -> None:
    whole = await reply_of_model(scripted_server, asked, name, "raise", stream=stream)
    assert whole["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "name"), MISMATCHED_NAMES)
async def test_a_mismatch_can_be_raised(scripted_server: ScriptedServer, asked: str, name: str, stream: bool) -> None:
    with pytest.raises(ModelMismatchError, match="asked for model") as caught:
        await reply_of_model(scripted_server, asked, name, "raise", stream=stream)
    assert (caught.value.asked, caught.value.served, caught.value.status) == (asked, name, 200)
    assert isinstance(caught.value, LLMValidationError)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_mismatch_is_logged_once_for_each_pair(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        for name in ("one", "one", "two", "one"):
            scripted_server.script(answer("Hi", model=name))
            whole: Any = await client.chat_completion(MESSAGES, stream=stream)
            if stream:
                await collect(whole)
    assert [record.args for record in caplog.records if record.levelno == logging.WARNING] == [
        ("test-model", "one", pytest.approx(caplog.records[0].args[2])),  # type: ignore[index]  # a tuple
        ("test-model", "two", pytest.approx(caplog.records[0].args[2])),  # type: ignore[index]  # a tuple
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_mismatch_can_be_ignored(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    await reply_of_model(scripted_server, "test-model", "other", "ignore", stream=stream)
    assert not caplog.records


@pytest.mark.parametrize("mode", ["warn", "raise"])
async def test_a_name_that_changes_between_chunks_raises(scripted_server: ScriptedServer, mode: str) -> None:
    behaviour = sse(piece("Hel"), piece("lo", model=None), piece("!", model="other"), done=True)
    error, chunks = await error_of_stream(scripted_server, behaviour, model_mismatch=mode)
    assert isinstance(error, ModelChangedDuringExecutionError)
    assert (error.old_model, error.new_model, error.status) == ("test-model", "other", 200)
    assert error.partial["choices"][0]["message"]["content"] == "Hello"
    assert error.partial["model"] == "test-model"
    assert len(chunks) == 2


async def test_chunks_without_a_name_change_nothing(scripted_server: ScriptedServer, client: LLMClient) -> None:
    nameless = piece("b", finish_reason="stop")
    del nameless["model"]
    scripted_server.script(sse(piece("a", model=None), piece("a"), nameless, piece("c", model=""), done=True))
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        assert [text_of(each) async for each in stream] == ["a", "a", "b", "c"]


# Huge errors


async def test_a_huge_error_of_a_server_is_read(scripted_server: ScriptedServer) -> None:
    error = await error_of_request(scripted_server, reply(400, openai_error("no " * 3_000_000)))
    assert type(error) is LLMResponseError
    assert error.message.startswith("the server answered 400: no no no")


async def test_a_huge_error_in_a_stream_is_read(scripted_server: ScriptedServer) -> None:
    huge = openai_error("The model has crashed.", data="x" * 2_000_000)
    error, _ = await error_of_stream(scripted_server, sse(piece("Hi"), huge))
    assert type(error) is ModelLoadError
    assert error.message == "the server ended the stream: The model has crashed."
    assert error.partial["choices"][0]["message"]["content"] == "Hi"
