"""Ranks tools by a query: by the words in their names and descriptions, or by embeddings.

The words are ranked by BM25 (S. Robertson and H. Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
2009). The libraries for it would save only the twenty lines below, and need numpy, which would be the largest
dependency of this package. Besides, the last release of rank-bm25 is from 2022, and bm25s is made for millions of
documents.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from operator import mul
from typing import Any, Final, Protocol

from lmbridge.agent.chat_client import EmbedsTexts
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.tools import Tool
from lmbridge.errors import LLMValidationError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_SATURATION: Final = 1.2
"""The parameter k1 of BM25: how quickly further occurrences of a word stop counting."""
_LENGTH_WEIGHT: Final = 0.75
"""The parameter b of BM25: how much the length of a description counts against it."""
_NAME_WEIGHT: Final = 3
"""How many times a word counts if it is in the name of a tool."""
_EMBEDDED_CHARACTERS: Final = 1_000
"""How many characters of the name and the description of a tool are embedded. Small models embed only 512 tokens."""
_MOST_VECTORS: Final = 10_000
"""The number of embeddings that an agent remembers."""

# Languages without blanks between words are split into characters.
_CHARACTER: Final = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD: Final = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")
_CAMEL_CASE: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_STOP_WORDS: Final = frozenset(
    word
    for line in (
        "a an and any are as at be by can do does for from get how i if in into is it me my need of on or that the",
        "this to tool tools use used uses using want what when which with you your",
    )
    for word in line.split()
)
_ENDINGS: Final = re.compile(r"(?<=\w{3})(?:ing|ed|ies|y|es|e|(?<![su])s)\Z")


class ToolRanker(Protocol):
    """Ranks tools by a query."""

    async def rank(self, query: str, tools: Sequence[Tool]) -> list[int]:
        """Returns the indexes of the tools that fit a query, the best first."""
        ...


class KeywordRanker:
    """Ranks tools by the words that a query shares with their names, descriptions and parameters."""

    async def rank(self, query: str, tools: Sequence[Tool]) -> list[int]:
        """Returns the indexes of the tools that share a word with the query, the best first."""
        return await asyncio.to_thread(_rank_by_keywords, query, tools)


class EmbeddingRanker:
    """Ranks tools by how similar their embeddings are to that of a query, or by words if the embeddings fail.

    Args:
        source: Lends the client, and remembers the embeddings of the tools.
        model: The embedding model.
    """

    def __init__(self, source: ClientSource, model: str) -> None:
        self._source = source
        self._model = model

    async def rank(self, query: str, tools: Sequence[Tool]) -> list[int]:
        """Returns the indexes of all tools, the most similar first. If embeddings fail, a `KeywordRanker` is used."""
        texts = [f"{tool.name}: {tool.description}"[:_EMBEDDED_CHARACTERS] for tool in tools]
        try:
            wanted, vectors = await self._embed(query, texts)
        # The program's own client may raise anything, and may return anything.
        except Exception as error:  # noqa: BLE001
            name = type(error).__name__
            logger.warning("tools are found by words, because the embeddings failed: %s: %s", name, error)
            return await KeywordRanker().rank(query, tools)
        return await asyncio.to_thread(_rank_by_similarity, wanted, vectors)

    async def _embed(self, query: str, texts: Sequence[str]) -> tuple[array[float], list[array[float]]]:
        """Returns the embedding of a query, and those of the texts. Each text is embedded only once and remembered.

        Raises:
            LLMError: The request failed, the client cannot embed texts, or there are too few or too many embeddings.
            Exception: The program's own client raised this exception, or returned a reply of another form.
        """
        known = self._source.embeddings
        vectors = {text: known[self._model, text] for text in texts if (self._model, text) in known}
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        async with self._source.lease(self._model) as client:
            if not isinstance(client, EmbedsTexts):
                raise LLMValidationError("the agent's client has no method embeddings()", hint="use an LLMClient")
            reply = await client.embeddings([query, *missing], model=self._model)
        entries = reply["data"]
        if len(entries) != 1 + len(missing):
            message = f"the client returned {len(entries)} embeddings for {1 + len(missing)} texts"
            raise LLMValidationError(message, hint="its method embeddings() must return one for each text, in order")
        wanted, *others = [_unit_vector(each["embedding"]) for each in entries]
        found = dict(zip(missing, others, strict=True))
        if len(known) + len(found) > _MOST_VECTORS:
            known.clear()
        known.update({(self._model, text): vector for text, vector in found.items()})
        vectors |= found
        return wanted, [vectors[text] for text in texts]


def _words_of(text: str) -> list[str]:
    """Returns the words of a text or of a name, in lower case and without their English endings."""
    words = _WORD.findall(_CAMEL_CASE.sub(" ", text).lower())
    # If all words are stop words, they are kept: a tool may be called `get`.
    words = [word for word in words if word not in _STOP_WORDS] or words
    return [_ENDINGS.sub("", word) for word in words]


def _document_of(tool: Tool) -> Counter[str]:
    """Returns how many times each word counts in the definition of a tool."""
    counts = Counter(
        _words_of(f"{tool.server or ''} {tool.description} {' '.join(tool.sent_parameters['properties'])}")
    )
    for word in _words_of(tool.name):
        counts[word] += _NAME_WEIGHT
    return counts


def _rank_by_keywords(query: str, tools: Sequence[Tool]) -> list[int]:
    documents = list(map(_document_of, tools))
    lengths = [document.total() for document in documents]
    average_length = sum(lengths) / len(lengths) if any(lengths) else 1.0
    scores = [0.0] * len(tools)
    for word in set(_words_of(query)):
        containing = sum(word in document for document in documents)
        rarity = math.log(1 + (len(tools) - containing + 0.5) / (containing + 0.5))
        for place, document in enumerate(documents):
            if count := document[word]:
                length = 1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * lengths[place] / average_length
                scores[place] += rarity * count * (_SATURATION + 1) / (count + _SATURATION * length)
    return sorted((place for place in range(len(tools)) if scores[place]), key=lambda place: -scores[place])


def _unit_vector(embedding: Collection[Any]) -> array[float]:
    length = math.sqrt(sum(value * value for value in embedding)) or 1.0
    return array("f", (value / length for value in embedding))


def _rank_by_similarity(wanted: array[float], vectors: Sequence[array[float]]) -> list[int]:
    similarities = [sum(map(mul, wanted, vector)) for vector in vectors]
    return sorted(range(len(vectors)), key=lambda place: -similarities[place])
