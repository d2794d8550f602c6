"""The client layer: it knows the servers' APIs, and returns plain dicts or streams of them."""

from lmbridge.client.completions import TextStream
from lmbridge.client.images import image_part
from lmbridge.client.llm import LLMClient
from lmbridge.client.models import CacheStats, ModelValidator
from lmbridge.client.pool import LLMClientPool, PoolStats
from lmbridge.client.reasoning import ReasoningSplitter, split_reasoning
from lmbridge.client.responses import ResponseEvent, ResponseStream
from lmbridge.client.server_info import ModelInfo, ServerInfo
from lmbridge.client.stream import ChatStream, collect

__all__ = [
    "CacheStats",
    "ChatStream",
    "LLMClient",
    "LLMClientPool",
    "ModelInfo",
    "ModelValidator",
    "PoolStats",
    "ReasoningSplitter",
    "ResponseEvent",
    "ResponseStream",
    "ServerInfo",
    "TextStream",
    "collect",
    "image_part",
    "split_reasoning",
]
