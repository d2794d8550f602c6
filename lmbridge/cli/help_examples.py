"""The examples at the end of each command's help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_LINES: Final[Mapping[str, tuple[str, ...]]] = {
    "": (
        'lmbridge chat "What is the capital of France?"',
        'lmbridge chat --local "Say hello"',
        "lmbridge models",
        "lmbridge doctor",
    ),
    "chat": (
        'lmbridge chat "What is the capital of France?"',
        "lmbridge chat                              (a conversation)",
        'lmbridge chat --local "Say hello"          (with the embedded server)',
        'git diff | lmbridge chat "Review this change"',
        'lmbridge chat -c "And in one sentence?"    (continues the last conversation)',
        'lmbridge chat -i photo.jpg "What is this?"',
        'lmbridge chat --schema person.json "Invent a person" | jq .name',
        'lmbridge chat --mcp files "What is in my notes?"',
    ),
    "run": (
        'lmbridge run --mcp time "What time is it in Tokyo?"',
        'lmbridge run --mcp files --approve none "Which of my notes mention the deadline?"',
        'lmbridge run --mcp all --max-rounds 10 --json "Tidy up the inbox" > events.jsonl',
        'lmbridge run --journal run.db --mcp files "Sort my notes"    (resume it with: lmbridge resume run.db)',
        'cat error.log | lmbridge run --mcp git "Which commit broke this?"',
    ),
    "resume": (
        "lmbridge resume run.db",
        "lmbridge resume run.db --list",
        "lmbridge resume run.db --run 6f1c2d --approve all",
    ),
    "models": (
        "lmbridge models",
        "lmbridge models --json",
        "lmbridge models load qwen/qwen3-4b --set context_length=8192",
        "lmbridge models unload qwen/qwen3-4b",
        "lmbridge models pull qwen/qwen3-4b-2507",
    ),
    "models load": (
        "lmbridge models load qwen/qwen3-4b",
        "lmbridge models load qwen/qwen3-4b --set context_length=8192 --set flash_attention=true",
    ),
    "models unload": ("lmbridge models unload qwen/qwen3-4b",),
    "models pull": (
        "lmbridge models pull qwen/qwen3-4b-2507",
        "lmbridge models pull https://huggingface.co/lmstudio-community/Qwen3-4B-GGUF",
    ),
    "doctor": (
        "lmbridge doctor",
        "lmbridge doctor --local",
        "lmbridge doctor --api-base http://127.0.0.1:11434/v1 --model qwen3:4b",
        "lmbridge doctor --try-switch --json",
    ),
    "bench": (
        "lmbridge bench",
        "lmbridge bench --local -n 1,2,4 --tokens 32",
        "lmbridge bench --prompt-tokens 2000 --svg speed.svg",
        "lmbridge bench --json > speed.json",
    ),
    "serve": (
        "lmbridge serve",
        "lmbridge serve --port 9931",
        "lmbridge serve -m ~/models/qwen3-4b-q4_k_m.gguf --context 32768",
    ),
    "gateway": (
        "lmbridge gateway",
        "lmbridge gateway http://127.0.0.1:1234/v1 --port 8081",
        "LMBRIDGE_GATEWAY_KEY=... lmbridge gateway --host 0.0.0.0",
    ),
    "mcp": (
        "claude mcp add --transport stdio lmbridge -- lmbridge mcp",
        "lmbridge mcp --model qwen3-4b",
    ),
}


def examples(command: str) -> str:
    """Returns the examples for the end of a command's help.

    Args:
        command: The command, such as "models load"; an empty string stands for `lmbridge` itself.
    """
    # The first character makes typer keep the line breaks.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in _LINES[command])])
