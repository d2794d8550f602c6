"""`SearchableToolset`: offers as many tools as fit into a budget, and lets the model find the others.

Other programs leave out the tools that do not fit; then a task that needs one of them fails. Here, the model gets one
more tool, `find_tools(query)`, and the tools that it finds are offered from then on. They are added at the end of the
list, so that what precedes them in the prompt remains in the server's cache. If there is no room for the definition of
such a tool, only the result of the search has its schema, and the model can call it nevertheless. The alternative was a
single tool that calls any other tool by its name. It would keep the whole prompt in the cache, but small models do not
manage to write the arguments of a call within the arguments of another one.

A small model may call a tool that is not offered, because it has read the name somewhere. Such a call is made like any
other, and from then on the tool is offered if there is room for its definition: the user has given it to the run, and
the model has named it correctly.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from typing import Any, Final

import attrs
import msgspec

from lmbridge._text import shorten
from lmbridge.agent.call_arguments import asked_name
from lmbridge.agent.definition_budget import DefinitionBudget, MaxDefinitionTokens, definition_limit, definition_tokens
from lmbridge.agent.settings import ToolSearch
from lmbridge.agent.tool_ranking import ToolRanker
from lmbridge.agent.tools import GrowingToolProvider, Tool
from lmbridge.agent.toolset import InvalidCall, ReadyCall, Toolset

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_MOST_FOUND: Final = 5
"""How many tools one search adds at most."""
_MOST_KNOWN: Final = 3
"""The largest number of tools that the result of a search names although they are already offered."""
_RESERVE: Final = 4
"""The budget is divided by this number, and one such part is kept free for tools that are found later."""
_LISTED_NAMES: Final = 50
"""The largest number of names of tools that a text lists."""
_LONGEST_LIST: Final = 1_500
"""The largest number of characters of such a list."""
_LONGEST_LINE: Final = 200
"""The largest number of characters of a tool's description in the result of a search."""
_FINDER_NAMES: Final = ("find_tools", "search_tools", "find_more_tools", "search_more_tools")
_QUERY: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "A few words about what the tool has to do."}},
}


@attrs.frozen(kw_only=True)
class ToolSearchOptions:
    """How a run deals with definitions that do not fit."""

    mode: ToolSearch = "never"
    """The option `tool_search` of the run."""
    max_definition_tokens: MaxDefinitionTokens = "auto"
    """The option `max_definition_tokens` of the run."""
    ranker: ToolRanker | None = None
    """Ranks the tools by a query; None if the model cannot search."""
    pinned: str | None = None
    """The tool that `tool_choice` names, which has to be offered; None if it names none."""

    def limit(self, context_length: int | None) -> int | None:
        """Returns how many tokens the definitions of a run may take; None if all tools are offered in any case."""
        if self.mode == "never" or self.ranker is None:
            return None
        return definition_limit(self.max_definition_tokens, context_length)

    def toolset(
        self, tools: Sequence[Tool], growing: Sequence[GrowingToolProvider] = (), *, limit: int | None
    ) -> Toolset:
        """Returns the toolset of a run.

        Args:
            tools: All tools of the run.
            growing: Providers that may add tools during the run.
            limit: The result of the method `limit` for the run.
        """
        if limit is None or self.ranker is None:
            return Toolset(tools, growing)
        # A limit that the user has set does not need a warning.
        log_level = logging.WARNING if self.max_definition_tokens == "auto" else logging.INFO
        return SearchableToolset(
            tools, growing, limit=limit, ranker=self.ranker, pinned=self.pinned, log_level=log_level
        )


class SearchableToolset(Toolset):
    """The tools of a run. Only those whose definitions fit into a budget are offered; the model can find the others.

    Args:
        tools: All tools, in the order in which they are offered.
        growing: Providers that may add tools during the run.
        limit: About how many tokens the definitions may take.
        ranker: Ranks the tools by a query of the model.
        pinned: A tool that is offered in any case, or None.
        log_level: The level of the log line that names the tools that do not fit. Default: INFO.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        growing: Sequence[GrowingToolProvider] = (),
        *,
        limit: int,
        ranker: ToolRanker,
        pinned: str | None = None,
        log_level: int = logging.INFO,
    ) -> None:
        self._limit = limit
        self._budget = DefinitionBudget(limit)
        self._ranker = ranker
        self._pinned = pinned
        self._log_level = log_level
        self._hidden: dict[str, Tool] = {}
        super().__init__(tools, growing)

    async def read_all(
        self, calls: Sequence[Mapping[str, Any]], *, repairs: bool = False, may_be_cut: bool = True
    ) -> list[ReadyCall | InvalidCall]:
        """Checks the calls of a reply like `Toolset.read_all`.

        The tools that the calls name are offered from now on if there is room for their definitions.
        """
        resolve = self.resolve_name if repairs else self.find_request_name
        names = dict.fromkeys(resolve(asked_name(call)) for call in calls)
        called = [name for name in names if name is not None and name in self._hidden]
        for name in called:
            logger.info("the model has called the tool %r, which it had not been offered", name)
            self._reveal(name)
        await self.prepare()
        return await super().read_all(calls, repairs=repairs, may_be_cut=may_be_cut)

    def _add(self, added: Mapping[str, Tool]) -> None:
        names = self._register(added)
        if self.finder is None and sum(map(definition_tokens, added.values())) <= (self._budget.left or 0):
            # All of them fit.
            offered, hidden = names, list[str]()
            for name in names:
                self._budget.take(self._tools[name])
        else:
            offered, hidden = self._split(names)
        self._offer(offered)
        if hidden:
            self._hide(hidden)

    def _split(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns the names of the tools that fit into the budget beside a finder, and the names of the others."""
        finder = self.finder or self._make_finder(names)
        reserve = self._limit // _RESERVE if finder is not None else 0
        if self.finder is None and finder is not None:
            reserve += definition_tokens(finder)
        pinned = None if self._pinned is None else self.find_request_name(self._pinned)
        if pinned is not None and pinned in names:
            self._budget.spent += definition_tokens(self._tools[pinned])
        offered = [name for name in names if name == pinned or self._budget.take(self._tools[name], reserve=reserve)]
        taken = set(offered)
        return offered, [name for name in names if name not in taken]

    def _hide(self, names: Sequence[str]) -> None:
        """Leaves tools to be found by a search, and offers the tool that searches, if it is not offered yet."""
        self._hidden |= {name: self._tools[name] for name in names}
        if self.finder is None and (finder := self._make_finder(names)) is not None:
            self.finder: Tool | None = finder
            self._budget.take(finder)
            self._offer(self._register({finder.name: finder}))
        logger.log(
            self._log_level,
            "%d of %d tools are left out, because the definitions do not fit into %d tokens%s: %s",
            len(self._hidden),
            len(self._tools) - (self.finder is not None),
            self._limit,
            f"; the model can find them with {self.finder.name}" if self.finder is not None else "",
            _listed(self._hidden),
        )

    def _make_finder(self, hidden: Sequence[str]) -> Tool | None:
        """Returns the tool that finds tools; None if its definition would leave too little room for others."""
        taken = {*self._tools, *self._run_names.values()}
        candidates = chain(_FINDER_NAMES, (f"{_FINDER_NAMES[0]}_{number}" for number in count(2)))
        name = next(each for each in candidates if each not in taken)
        description = (
            f"Finds more tools. {len(hidden)} tools are not listed here. Search for one before you say that you cannot"
            f" do something. Some of their names: {_listed(hidden, min(_LONGEST_LIST, self._limit // _RESERVE))}."
        )
        finder = Tool(name, description, _QUERY, self._search, annotations={"readOnlyHint": True})
        return finder if definition_tokens(finder) <= self._limit // 2 else None

    async def _search(self, query: str = "") -> str:
        """Finds tools for a query, offers them, and describes them to the model."""
        if not self._hidden:
            return "There are no more tools: all of them are offered to you."
        names = self.all_names
        if not query.strip():
            return f"Say in query what the tool has to do. {self._others()}"
        ranked = [names[place] for place in await self._ranker.rank(query, [self._tools[name] for name in names])]
        # Another search in the same reply may have found some of these tools in the meantime.
        hits = [name for name in ranked if name in self._hidden][:_MOST_FOUND]
        worst = ranked.index(hits[-1]) if hits else len(ranked)
        known = [name for name in ranked[:worst] if name not in self._hidden][:_MOST_KNOWN]
        logger.info("%s(%r) has found: %s", self.finder.name if self.finder else "", query[:_LONGEST_LINE], hits)
        lines = [self._reveal(name) for name in hits]
        await self.prepare()
        if known:
            lines.append(f"Already offered to you: {', '.join(known)}.")
        if not hits:
            lines.append(
                f"No {'other ' if known else ''}tool matches {shorten(query, _LONGEST_LINE)!r}. {self._others()}"
            )
        return "\n".join(["You can call these tools now:", *lines] if hits else lines)

    def _reveal(self, name: str) -> str:
        """Offers a tool if there is room for its definition, and returns the line about it for the model."""
        tool = self._tools[name]
        line = f"- {name}: {shorten(' '.join(tool.description.split()), _LONGEST_LINE)}"
        if self._budget.take(tool):
            del self._hidden[name]
            self._offer([name])
            return line
        # The model may call the tool although it is not offered, so it gets the schema in the text.
        if not tool.has_converter:
            self._unprepared.append(tool)
        return f"{line} Its arguments follow this JSON schema: {msgspec.json.encode(tool.sent_parameters).decode()}"

    def _others(self) -> str:
        return f"The other tools are: {_listed(self._hidden)}."

    def _describe_unknown(self, asked: str) -> str:
        text = super()._describe_unknown(asked)
        return f"{text}. {self.finder.name} finds {len(self._hidden)} others" if self.finder and self._hidden else text


def _listed(names: Collection[str], room: int = _LONGEST_LIST) -> str:
    """Lists as many names as there is room for, but at least one, and says how many others there are."""
    listed: list[str] = []
    for name in names:
        if listed and (len(listed) == _LISTED_NAMES or sum(map(len, listed)) + 2 * len(listed) + len(name) > room):
            break
        listed.append(name)
    more = f", and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return f"{', '.join(listed)}{more}"
