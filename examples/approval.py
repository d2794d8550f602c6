"""An agent that may tidy up a folder, and asks before it deletes anything.

    python examples/approval.py ~/Downloads

It uses the server of LMBRIDGE_API_BASE, or LM Studio. Answer with y, or with a reason: the model reads it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lmbridge import Agent, LLMClient, LLMError, ToolCall, ToolError

TASK = "Delete the files that nobody needs any more, such as temporary ones. Say what you have deleted."


async def approve(call: ToolCall) -> bool | str:
    """Asks the user about calls that change something. A text is a refusal with a reason."""
    if call.name != "delete_file":
        return True
    # A thread, because other runs of the program go on while the user thinks.
    answer = await asyncio.to_thread(input, f"delete {(call.arguments or {}).get('name')!r}? [y, or a reason] ")
    return answer.strip().lower() == "y" or answer or False


async def main(folder: Path) -> None:
    """Runs the agent and prints its report."""

    def list_files() -> list[str]:
        """Lists the files of the folder."""
        return sorted(path.name for path in folder.iterdir() if path.is_file())

    def delete_file(name: str) -> str:
        """Deletes a file of the folder."""
        if name not in list_files():
            raise ToolError(f"there is no file {name!r}; list_files() lists them")
        (folder / name).unlink()
        return f"deleted {name}"

    async with LLMClient() as client:
        agent = Agent(
            client, tools=[list_files, delete_file], approve=approve, max_rounds=8, max_tokens=200, on_limit="answer"
        )
        print((await agent.run(TASK)).text)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("approval: name the folder to tidy up")
    try:
        asyncio.run(main(Path(sys.argv[1])))
    except LLMError as error:
        sys.exit(f"approval: {error}")
