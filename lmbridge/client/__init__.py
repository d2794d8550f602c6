"""The client layer: it knows the servers' APIs, and returns plain dicts or streams of them."""

from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.collecting import collect
from lmbridge.client.llm import LLMClient

__all__ = ["ChatStream", "LLMClient", "collect"]
