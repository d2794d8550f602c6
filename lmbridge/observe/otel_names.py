"""The names of OpenTelemetry's semantic conventions for generative AI, and lmbridge's own, in one place.

The conventions are in development and change. The names here are those of semantic-conventions-genai v0.1.0:
https://github.com/open-telemetry/semantic-conventions-genai/tree/v0.1.0/docs/gen-ai

The names of the metrics are those in the contents of `client-inference.md` and `gen-ai-metrics.md` at that tag. Their
instruments, units and attributes, and those of embeddings, were compared with commits of the same repository: 024a4f9
(`client-inference.md`), 27f82f0 (`gen-ai-token-metrics.md`) and 88eccb1 (`client-embeddings.md`). The names of v1.41
that no longer exist are listed in `non-normative/migration.md`, which was read at 32c328e.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
TOKEN_MODALITY: Final = "gen_ai.token.modality"  # noqa: S105 - the name of an attribute
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
STATUS: Final = "http.response.status_code"
NETWORK_TRANSPORT: Final = "network.transport"
JSONRPC_ID: Final = "jsonrpc.request.id"
MCP_METHOD: Final = "mcp.method.name"
MCP_PROTOCOL: Final = "mcp.protocol.version"

INVOKE_AGENT: Final = "invoke_agent"
EXECUTE_TOOL: Final = "execute_tool"
EMBEDDINGS: Final = "embeddings"
OPERATIONS: Final[Mapping[str, str]] = {
    "chat completion": "chat",
    "response": "chat",
    "text completion": "text_completion",
    "embeddings": EMBEDDINGS,
}
"""The names that the conventions have for lmbridge's operations. Other operations, such as model lists, do not generate
anything and have no span."""

UNKNOWN_MODALITY: Final = "unknown"
"""The modality of all tokens, because model servers do not say which tokens of a prompt are text or images."""

INFERENCE_DURATION_METRIC: Final = "gen_ai.client.inference.duration"
FIRST_CHUNK_METRIC: Final = "gen_ai.client.inference.time_to_first_chunk"
INPUT_USAGE_METRIC: Final = "gen_ai.client.inference.usage.input_tokens"
OUTPUT_USAGE_METRIC: Final = "gen_ai.client.inference.usage.output_tokens"
CACHE_USAGE_METRIC: Final = "gen_ai.client.inference.usage.cache_read.input_tokens"
INPUT_TOKENS_METRIC: Final = "gen_ai.client.inference.operation.input_tokens"
OUTPUT_TOKENS_METRIC: Final = "gen_ai.client.inference.operation.output_tokens"
EMBEDDINGS_DURATION_METRIC: Final = "gen_ai.client.embeddings.duration"
EMBEDDINGS_TOKENS_METRIC: Final = "gen_ai.client.embeddings.operation.input_tokens"
DURATION_BUCKETS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS_BUCKETS: Final = (
    *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536),
    *(262144, 1048576, 4194304, 16777216, 67108864),
)

QUEUE_SECONDS: Final = "lmbridge.queue.seconds"
"""How long the request waited for its permit."""
ATTEMPTS: Final = "lmbridge.attempts"
"""How often the request was sent."""
OUTCOME: Final = "lmbridge.outcome"
"""How the request or the tool call ended."""
ROUNDS: Final = "lmbridge.rounds"
"""How many rounds the run had."""
STOP_REASON: Final = "lmbridge.stop_reason"
"""Why the run ended."""
RETRY_EVENT: Final = "lmbridge.retry"
"""An event of a request that will be sent again."""
RETRY_REASON: Final = "lmbridge.retry.reason"
"""Why it will be sent again."""
RETRY_WAIT: Final = "lmbridge.retry.wait_seconds"
"""How long it waits before it is sent again."""
SWAP_EVENT: Final = "lmbridge.model_swap"
"""An event of a request for which the server swaps models."""
LOAD_EVENT: Final = "lmbridge.model_load"
"""An event of a run that waits for the server to load its model."""
MCP_SERVER: Final = "lmbridge.mcp.server"
"""The name of the MCP server in the configuration."""
SWAP_BEFORE: Final = "lmbridge.model_swap.before"
"""The model that is replaced."""
