"""Counts the tokens of a prompt: exactly where the server can, and otherwise by an estimate that is marked as one.

Only the server has the tokenizer and the chat template of the model. Two servers count a whole chat, with its template
and its tools, without generating anything:

- llama.cpp: `POST /v1/chat/completions/input_tokens` with the body of a chat completion returns `input_tokens`
  ("Token Counting" in its tools/server/README.md; 2 to 5 ms on the embedded server).
- vLLM: `POST /tokenize` with `messages` and `tools` returns `count` (`TokenizeChatRequest` in
  vllm/entrypoints/serve/tokenize/protocol.py).

LM Studio and Ollama have no such endpoint. A tokenizer on the client's side was the alternative: it would be a large
dependency, would have to be downloaded for each model, and still would not know the template. So for these servers, the
number is estimated from the size of the messages and tools as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final
from weakref import WeakKeyDictionary

import attrs
import msgspec

from lmbridge._checks import MAPPING_TYPES, is_integer
from lmbridge.client.api_requests import PROBE_BYTES, PROBE_SECONDS, ServerApi, is_unknown_path
from lmbridge.client.json_codec import encode_body
from lmbridge.errors import LLMError, ModelLoadError
from lmbridge.transport import BaseTransport

BYTES_PER_TOKEN: Final = 3
"""The bytes of JSON that are estimated as one token: slightly too few for English and code, about right for Chinese."""
IMAGE_BYTES: Final = 3_000
"""The size that an image counts as, in bytes. It stands for about 1,000 tokens, which is more than most models use."""


@attrs.frozen
class TokenCount:
    """The number of tokens of a prompt."""

    tokens: int
    """How many tokens the prompt has, with its chat template and the definitions of the tools."""
    exact: bool
    """Whether the server has counted them. If not, the number is an estimate from the size of the prompt."""


@attrs.frozen
class _Endpoint:
    path: str
    below_root: bool
    field: str


_COUNT_ENDPOINTS: Final = (
    _Endpoint("/chat/completions/input_tokens", below_root=False, field="input_tokens"),  # llama.cpp
    _Endpoint("/tokenize", below_root=True, field="count"),  # vLLM
)


@cache
def _known_endpoints() -> WeakKeyDictionary[BaseTransport, tuple[_Endpoint, ...]]:
    """The endpoint with which each server has counted. An empty tuple stands for a server that cannot count."""
    return WeakKeyDictionary()


async def count_tokens(server: ServerApi, body: Mapping[str, Any]) -> TokenCount:
    """Counts the tokens of the body of a chat completion; see `LLMClient.count_tokens`.

    Raises:
        LLMError: The server did not answer, or refused the messages.
    """
    # The body is encoded first, so that a value that JSON does not have is refused whatever the server can do.
    encoded = encode_body(body)
    for each in server.each():
        if (tokens := await _counted_by(each, body)) is not None:
            return TokenCount(tokens, exact=True)
    return TokenCount(estimate_tokens(msgspec.json.decode(encoded)), exact=False)


async def _counted_by(server: ServerApi, body: Mapping[str, Any]) -> int | None:
    """Returns the number of tokens that a server counts.

    The result is None if the server has no endpoint for this, or has not loaded the model.
    """
    transport, known = server.transport, _known_endpoints()
    is_certain = True
    for endpoint in known.get(transport, _COUNT_ENDPOINTS):
        request = server.build_post(
            "token count",
            endpoint.path,
            body,
            body.get("model"),
            below_root=endpoint.below_root,
            queued=False,
            max_bytes=PROBE_BYTES,
        )
        limit = request.timeouts.first_byte
        seconds = PROBE_SECONDS if limit is None else min(PROBE_SECONDS, limit)
        request.timeouts = attrs.evolve(request.timeouts, first_byte=seconds)
        # A count must not load a model, for which llama.cpp's router might have to unload another one.
        request.query = {"autoload": "false", **request.query}
        reply = await server.request(request)
        try:
            value = server.json_object(reply)
        except ModelLoadError:
            return None
        except LLMError as error:
            if is_unknown_path(error, reply):
                continue
            await server.complete_error(error)
            raise
        if is_integer(tokens := value.get(endpoint.field)):
            known[transport] = (endpoint,)
            return tokens
        # At the path of vLLM's endpoint, an older llama.cpp has another one, which returns only `tokens`. In any other
        # object, the field may have been damaged on the way, so the next call asks again.
        is_certain &= value.keys() == {"tokens"}
    # If a known endpoint is missing now, another server has taken its place, and all are tried again at the next call.
    if not known.pop(transport, ()) and is_certain:
        known[transport] = ()
    return None


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Returns an estimate of the tokens that the messages and tools in the body of a chat completion have.

    Args:
        body: The body as the server reads it: decoded from what is sent. The caller's own body may contain
            mappings that are not dicts, and halves of surrogate pairs, which are encoded differently.
    """
    size = sum(map(size_of, body["messages"])) + (len(_encode(body["tools"])) if body.get("tools") else 0)
    return -(-size // BYTES_PER_TOKEN)


def size_of(message: Mapping[str, Any]) -> int:
    """Returns about how many bytes a message takes as JSON. An image counts as 3,000 bytes, whatever its size."""
    content = message.get("content")
    if not isinstance(content, list):
        return len(_encode(message))
    parts = sum(IMAGE_BYTES if _is_image(part) else len(_encode(part)) for part in content)
    return parts + len(_encode({**message, "content": None}))


def _is_image(part: object) -> bool:
    # Some servers accept strings as parts.
    return isinstance(part, MAPPING_TYPES) and part.get("type") == "image_url"


_encode: Final[Callable[[Any], bytes]] = msgspec.json.Encoder().encode
