r"""The syntaxes in which models write tool calls, as data.

Servers have a parser for each syntax. If the wrong parser is configured, or the model does not keep to its template,
the call is left in the text of the reply. The tables here are used to read such calls (`call_reader`), to hold them
back from a stream (`held_text`), and to warn about those that could not be read (`unread_calls`).

The syntaxes are those of the tool parsers of vLLM (vllm/tool_parsers), of SGLang (python/sglang/srt/function_call) and
of llama.cpp (common/chat.cpp, common/parsers), and those in the documentation of the models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

NAME: Final = r"[\w.:/-]{1,100}"
"""The name of a tool, as models write it outside of quotes."""


class CallSyntax(NamedTuple):
    """A syntax of calls, which is recognized by the beginning of a call."""

    opening: str
    """The text with which a call begins."""
    content: re.Pattern[str]
    """Matches what follows the opening if the opening begins a call, and not if it is only mentioned."""
    closings: tuple[str, ...] = ()
    """The texts that may end a call. A call may also end without them."""
    heading: re.Pattern[str] | None = None
    """Matches the rest of an opening that contains the name of the tool, which is the group of the pattern. The
    arguments follow: a JSON object, or parameters (`PARAMETERS`). None if a call in any form follows the opening."""


_END_OR_JSON: Final = re.compile(r"\s*(?:```\w*\s*)?(?:\Z|[\[{<])")
_NAME_AND_MORE: Final = re.compile(rf"\s*(?:```\w*\s*)?(?:\Z|[\[{{<]|{NAME}\s*(?:[\[({{<]|\Z))")
_PYTHON_OR_JSON: Final = re.compile(rf"\s*(?:\Z|[\[{{]|{NAME}\s*\(|import\s|from\s)")
_ANYTHING: Final = re.compile("")
_EQUALS_NAME: Final = re.compile(rf"[\"']?({NAME})[\"']?[ \t]*>?\s*")
_QUOTED_NAME: Final = re.compile(r"""["']([^"'<>\n]{1,100})["'][^<>\n]{0,100}>?\s*""")
_HARMONY_NAME: Final = (
    rf"(?:functions\.)?({NAME})"
    r"(?:\s*<\|channel\|>\s*\w{1,20})?\s*(?:<\|constrain\|>)?\s*(?:json|code)?\s*(?:<\|message\|>)?\s*"
)

CALL_SYNTAXES: Final = (
    # Hermes 2 Pro: https://github.com/NousResearch/Hermes-Function-Calling; Qwen 2.5 and 3, Granite 4, Ernie 4.5. GLM
    # (name, then `<arg_key>`) and Qwen3-Coder (`<function=`) use the same tag with another content.
    CallSyntax("<tool_call>", _NAME_AND_MORE, ("</tool_call>",)),
    # LM Studio's own format: https://lmstudio.ai/docs/developer/openai-compat/tools
    CallSyntax("[TOOL_REQUEST]", _NAME_AND_MORE, ("[END_TOOL_REQUEST]",)),
    # Jamba (vLLM, jamba_tool_parser.py), Hunyuan (hunyuan_a13b_tool_parser.py), MiniMax M1 (minimax_tool_parser.py).
    CallSyntax("<tool_calls>", _END_OR_JSON, ("</tool_calls>",)),
    # Qwen2.5-Coder repeats the tag of its prompt: https://github.com/ggml-org/llama.cpp/issues/12279
    CallSyntax("<tools>", re.compile(r"\s*(?:\Z|[\[{])"), ("</tools>",)),
    # Nemotron Nano 2 (vLLM, nemotron_nano_v2_tool_parser.py).
    CallSyntax("<TOOLCALL>", _END_OR_JSON, ("</TOOLCALL>",)),
    # Granite 20B (vLLM, granite_20b_fc_tool_parser.py) and fine-tuned models; Glaive's data set writes `functioncall`.
    CallSyntax("<function_call>", _NAME_AND_MORE, ("</function_call>",)),
    CallSyntax("<functioncall>", _NAME_AND_MORE, ("</functioncall>", "<|endoftext|>")),
    # Olmo 3 (vLLM, olmo3_tool_parser.py) puts Python's syntax into it, and Claude and DeepSeek 3.2 `<invoke name=`.
    CallSyntax("<function_calls>", _NAME_AND_MORE, ("</function_calls>",)),
    # MiniMax M2 (vLLM, minimax_m2_tool_parser.py) and Seed-OSS (seed_oss_tool_parser.py).
    CallSyntax("<minimax:tool_call>", _END_OR_JSON, ("</minimax:tool_call>",)),
    CallSyntax("<seed:tool_call>", _END_OR_JSON, ("</seed:tool_call>",)),
    # LongCat (vLLM, longcat_tool_parser.py).
    CallSyntax("<longcat_tool_call>", _END_OR_JSON, ("</longcat_tool_call>",)),
    # Llama 3 puts JSON into it (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1, "custom tools"),
    # and Qwen3-Coder puts `<parameter=` into it (vLLM, qwen3coder_tool_parser.py).
    CallSyntax(
        "<function=",
        re.compile(rf"[\"']?{NAME}[\"']?\s*(?:\Z|\{{|>\s*(?:\Z|[{{<]|[^<]{{0,200}}</f))"),
        ("</function>",),
        _EQUALS_NAME,
    ),
    # MiniCPM 5 (vLLM, minicpm5xml_tool_parser.py).
    CallSyntax("<function name=", _ANYTHING, ("</function>",), _QUOTED_NAME),
    # Claude: https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/overview; MiniMax M2; Step 3
    # (vLLM, step3_tool_parser.py); DeepSeek 3.2 (deepseekv32_tool_parser.py).
    CallSyntax("<invoke name=", _ANYTHING, ("</invoke>",), _QUOTED_NAME),
    CallSyntax("<steptml:invoke name=", _ANYTHING, ("</steptml:invoke>",), _QUOTED_NAME),
    CallSyntax("<\uff5cDSML\uff5cfunction_calls>", _ANYTHING, ("</\uff5cDSML\uff5cfunction_calls>",)),
    CallSyntax("<\uff5cDSML\uff5cinvoke name=", _ANYTHING, ("</\uff5cDSML\uff5cinvoke>",), _QUOTED_NAME),
    # Llama 3.1 to 3.3 (vLLM, llama_tool_parser.py) and Llama 4 (llama4_pythonic_tool_parser.py).
    CallSyntax("<|python_tag|>", _PYTHON_OR_JSON, ("<|eom_id|>", "<|eot_id|>")),
    CallSyntax("<|python_start|>", _PYTHON_OR_JSON, ("<|python_end|>",)),
    # Mistral, in both of its forms: a list of calls, or a name and then its arguments.
    # https://github.com/mistralai/mistral-common (tokens/instruct); vLLM, mistral_tool_parser.py.
    CallSyntax("[TOOL_CALLS]", _NAME_AND_MORE),
    # Harmony, the format of gpt-oss: https://developers.openai.com/cookbook/articles/openai-harmony
    CallSyntax(
        "<|channel|>commentary",
        re.compile(r"\s*to\s*="),
        ("<|call|>",),
        re.compile(r"\s*to\s*=\s*" + _HARMONY_NAME),
    ),
    CallSyntax(
        "<|channel|>analysis",
        re.compile(r"\s*to\s*="),
        ("<|call|>",),
        re.compile(r"\s*to\s*=\s*" + _HARMONY_NAME),
    ),
    CallSyntax(
        "<|start|>assistant",
        re.compile(r"\s*(?:<\|channel\|>\s*\w{1,20}\s*)?to\s*="),
        ("<|call|>",),
        re.compile(r"\s*(?:<\|channel\|>\s*\w{1,20}\s*)?to\s*=\s*" + _HARMONY_NAME),
    ),
    CallSyntax(
        "to=functions.",
        re.compile(r"[\w.-]{1,100}\s*(?:\Z|[<{]|code|json)"),
        ("<|call|>",),
        re.compile(_HARMONY_NAME),
    ),
    # DeepSeek V3, R1 and V3.1 (SGLang, deepseekv3_detector.py, deepseekv31_detector.py).
    CallSyntax(
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        _ANYTHING,
        ("<\uff5ctool\u2581calls\u2581end\uff5c>",),
    ),
    CallSyntax("<\uff5ctool\u2581call\u2581begin\uff5c>", _ANYTHING, ("<\uff5ctool\u2581call\u2581end\uff5c>",)),
    # Step 3 writes the same tokens with underscores (vLLM, step3_tool_parser.py).
    CallSyntax("<\uff5ctool_calls_begin\uff5c>", _ANYTHING, ("<\uff5ctool_calls_end\uff5c>",)),
    CallSyntax("<\uff5ctool_call_begin\uff5c>function", _ANYTHING, ("<\uff5ctool_call_end\uff5c>",)),
    # Kimi K2: https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/docs/tool_call_guidance.md
    CallSyntax("<|tool_calls_section_begin|>", _ANYTHING, ("<|tool_calls_section_end|>",)),
    CallSyntax("<|tool_call_begin|>", _ANYTHING, ("<|tool_call_end|>",)),
    # Kimi K3 (vLLM, kimi_k3_tool_parser.py).
    CallSyntax("<|open|>tools<|sep|>", _ANYTHING, ("<|close|>tools<|sep|>", "<|close|>message<|sep|>")),
    CallSyntax(
        "<|open|>call ",
        _ANYTHING,
        ("<|close|>call<|sep|>",),
        re.compile(r"""tool="([^"]{1,100})"[^<>|]{0,100}<\|sep\|>\s*"""),
    ),
    # Granite 3 (vLLM, granite_tool_parser.py) and Phi-4 mini (phi4mini_tool_parser.py).
    CallSyntax("<|tool_call|>", _END_OR_JSON, ("<|/tool_call|>", "</|tool_call|>")),
    CallSyntax("functools", re.compile(r"\[\s*\{")),
    # LFM2 (vLLM, lfm2_tool_parser.py).
    CallSyntax("<|tool_call_start|>", _ANYTHING, ("<|tool_call_end|>",)),
    # Gemma 4 (vLLM, gemma4_utils.py) and FunctionGemma: https://ai.google.dev/gemma/docs/functiongemma
    CallSyntax("<|tool_call>", _ANYTHING, ("<tool_call|>", "<turn|>")),
    CallSyntax("<start_function_call>", _ANYTHING, ("<end_function_call>",)),
    # Apertus (vLLM, apertus_tool_parser.py), in which the name is the only key of an object.
    CallSyntax("<|tools_prefix|>", _END_OR_JSON, ("<|tools_suffix|>",)),
    # InternLM 2 and 3 (vLLM, internlm2_tool_parser.py).
    CallSyntax("<|action_start|>", _ANYTHING, ("<|action_end|>",)),
    # Command R and Command R7B: https://docs.cohere.com/docs/tool-use (the raw prompts).
    CallSyntax("<|START_ACTION|>", _END_OR_JSON, ("<|END_ACTION|>",)),
    CallSyntax("Action: ```json", _END_OR_JSON, ("```",)),
    # GigaChat 3 (vLLM, gigachat3_tool_parser.py).
    CallSyntax("<|function_call|>", _END_OR_JSON, ("<|message_sep|>",)),
    CallSyntax("function call<|role_sep|>", _END_OR_JSON, ("<|message_sep|>",)),
    # Functionary 3.2: https://github.com/MeetKai/functionary
    CallSyntax(
        ">>>",
        re.compile(r"(?!all\b)[\w.-]{1,100}[ \t]*\r?\n\s*\{"),
        (),
        re.compile(r"([\w.-]{1,100})[ \t]*\r?\n\s*"),
    ),
    # Gemma 3: https://ai.google.dev/gemma/docs/capabilities/function-calling, and models that use fences for JSON.
    CallSyntax("```tool_code", re.compile(r"\s"), ("```",)),
    CallSyntax("```tool_call", re.compile(r"\s"), ("```",)),
    # ReAct, as in many agent prompts: https://arxiv.org/abs/2210.03629
    CallSyntax(
        "Action:",
        re.compile(rf"[ \t]*{NAME}[ \t]*\r?\n+Action Input:"),
        ("```",),
        re.compile(rf"[ \t]*({NAME})[ \t]*\r?\n+Action Input:[ \t]*(?:```\w*)?\s*"),
    ),
)
"""The syntaxes whose calls begin with an opening that has no other meaning. One may be nested in another."""

AT_LINE_START: Final = (
    ">>>",
    "Action:",
    "Action: ```json",
    "```tool_code",
    "```tool_call",
    "function call<|role_sep|>",
)
"""Openings that begin a call only at the beginning of a line; see `begins_line`."""
MOST_INDENTED: Final = 3
"""How many spaces may precede a call on its line. In Markdown, a line with more of them is code."""


def begins_line(text: str, position: int, *, line_before: str = "") -> bool:
    """Returns whether a position of a text is the beginning of a line, apart from a few spaces.

    Args:
        text: The text.
        position: The position.
        line_before: What precedes the text on its first line. Default: nothing.
    """
    # One character more than the spaces shows whether the line has more of them. Its beginning may be far away.
    begin = max(0, position - MOST_INDENTED - 1)
    before = text[begin:position] if begin else line_before + text[:position]
    line = before.rpartition("\n")[2]
    return len(line) <= MOST_INDENTED and not line.strip()


class ParameterSyntax(NamedTuple):
    """A syntax of the parameters of a call that is not JSON."""

    opening: re.Pattern[str]
    """Matches what precedes the value. The group `key` is the name of the parameter. If there is a group `json` and it
    matches, the value is JSON; otherwise it is a text."""
    closing: str
    """The text that follows the value."""


PARAMETERS: Final = (
    # Qwen3-Coder, Seed-OSS.
    ParameterSyntax(re.compile(r"<parameter=[\"']?(?P<key>[^<>\n\"']{1,100})[\"']?>"), "</parameter>"),
    # Claude, MiniMax M2.
    ParameterSyntax(re.compile(r"""<parameter name=["'](?P<key>[^"'\n]{1,100})["'][^<>\n]{0,60}>"""), "</parameter>"),
    # MiniCPM 5.
    ParameterSyntax(re.compile(r"""<param name=["'](?P<key>[^"'\n]{1,100})["'][^<>\n]{0,60}>"""), "</param>"),
    # GLM 4.5 to 4.7.
    ParameterSyntax(re.compile(r"<arg_key>\s*+(?P<key>[^<>\n]{1,100}?)\s*+</arg_key>\s*<arg_value>"), "</arg_value>"),
    # Step 3.
    ParameterSyntax(
        re.compile(r"""<steptml:parameter name=["'](?P<key>[^"'\n]{1,100})["']>"""), "</steptml:parameter>"
    ),
    # DeepSeek 3.2.
    ParameterSyntax(
        re.compile('<\uff5cDSML\uff5cparameter name="(?P<key>[^"\n]{1,100})"(?: string="(?:true|(?P<json>false))")?>'),
        "</\uff5cDSML\uff5cparameter>",
    ),
    # Kimi K3.
    ParameterSyntax(
        re.compile(
            r"""<\|open\|>argument key="(?P<key>[^"\n]{1,100})"(?: type="(?:string|(?P<json>\w{1,20}))")?<\|sep\|>"""
        ),
        "<|close|>argument<|sep|>",
    ),
)

NAME_BEFORE_JSON: Final = re.compile(
    # DeepSeek V3 begins with the type; Kimi's names are ids, such as `functions.add:0`; Gemma's begin with `call:`.
    rf"(?:function\s*<\uff5ctool[\u2581_]sep\uff5c>)?\s*(?:call:|functions\.)?({NAME}?)(?::\d{{1,5}})?\s*+"
    # Mistral since its eleventh tokenizer.
    r"(?:\[CALL_ID\]\s*\w{1,40}\s*+)?(?:\[ARGS\])?"
    r"(?:<\uff5ctool[\u2581_]sep\uff5c>|<\|tool_call_argument_begin\|>)?\s*+(?:```\w{0,20}\s*+)?(?=\{)"
)
"""Matches the name of a tool in front of a JSON object with its arguments, within the tags of one of the syntaxes."""
NAME_BEFORE_PARAMETERS: Final = re.compile(rf"\s*({NAME})\s*+(?:\\n)?\s*+(?=<arg_key>)")
NAME_ALONE: Final = re.compile(rf"\s*({NAME})\s*(?=</tool_call>)")
"""Matches the name in a call of GLM that has no arguments."""
DISCARDED: Final = re.compile(
    r"\s*(?:```\w{0,20}(?=\s)|<\|plugin\|>|<\|interpreter\|>|<\uff5ctool[\u2581_]sep\uff5c>|\]<\]minimax\[>\[)"
)
"""Matches a text without meaning that may stand between an opening and the call."""

CALL_KEYS: Final = ("name", "tool_name")
"""The keys under which a call in JSON may have the name of the tool."""
ARGUMENT_KEYS: Final = ("arguments", "parameters")
"""The keys under which a call in JSON may have the arguments. Llama's and Cohere's models write `parameters`."""
OTHER_CALL_KEYS: Final = frozenset(
    {"id", "call_id", "tool_call_id", "type", "index", "function", "thought", "thoughts", "reasoning", "explanation"}
)
"""Further keys that an object may have and still be a call."""
_BARE_OBJECT: Final = (
    r"\s{0,50}[\"'](?:name|tool_name|arguments|parameters|function|type|id|tool_call_id|tool_calls)[\"']\s{0,20}:"
)
_BARE_CALLS: Final = {
    "{": (_BARE_OBJECT,),
    # A list of such objects, or of calls in the syntax of Python: Llama 3.2 and 4, LFM2, and ToolACE.
    "[": (rf"\s{{0,50}}\{{{_BARE_OBJECT}", r"\s{0,20}[A-Za-z_][\w.]{0,99}\("),
}
"""How calls without an opening begin: their first character, and the patterns of what follows it."""


def _compile_openings(openings: Iterable[str]) -> re.Pattern[str]:
    """Returns the pattern that finds openings and bare calls.

    Each alternative begins with a different character, so that `re` can skip all positions without one of these.
    """
    rest_of: dict[str, list[str]] = {first: list(rest) for first, rest in _BARE_CALLS.items()}
    # Of two openings, the longer one comes first.
    for opening in sorted(openings, key=len, reverse=True):
        rest_of.setdefault(opening[0], []).append(re.escape(opening[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in rest_of.items()))


SYNTAX_OF: Final = {each.opening: each for each in CALL_SYNTAXES}
OPENING: Final = _compile_openings(SYNTAX_OF)
"""Matches everything with which a call can begin."""
WORDS: Final = tuple(opening for opening in SYNTAX_OF if opening[0].isalpha())
"""The openings that begin with a letter. Nearly every text contains these letters, which makes a search slow."""
OPENING_WITHOUT_WORDS: Final = _compile_openings(opening for opening in SYNTAX_OF if opening not in WORDS)
"""Matches the same as `OPENING` in a text without any of `WORDS`, in a fifth of the time."""
CLOSING: Final = re.compile(
    r"\s*(?:```(?!\w)|"
    + "|".join(sorted({re.escape(each) for syntax in CALL_SYNTAXES for each in syntax.closings if each != "```"}))
    + ")"
)
"""Matches a closing of any syntax."""
MARKS: Final = ("{", "[", "<")
"""Every call contains one of these characters, unless its syntax is listed in `UNMARKED`."""
UNMARKED: Final = ("```tool_code",)
"""The openings of the syntaxes whose calls may have none of `MARKS`."""
