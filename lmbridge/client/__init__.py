"""The client layer: it knows the servers' APIs, and returns plain dicts or streams of them."""

from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.llm import LLMClient
from lmbridge.client.stream import collect

__all__ = ["ChatStream", "LLMClient", "collect"]
