"""The command line, `lmbridge` and `python -m lmbridge` (extra `cli`).

`application.py` lists the commands. Each command is a module with a function that declares its arguments, for typer,
and a coroutine that does the work. What they share: `options.py` (options of several commands), `connection.py`
(finding a server), `command_runner.py` (signals, errors, exit statuses), `terminal.py` (everything that is written).

typer was chosen over argparse because it generates the completion for three shells and reads the arguments from type
hints, rich for tables and live views, and prompt_toolkit for the line editor of `chat`: history, several lines, and
pasted text that is not sent at its first line break, which `input()` does not have.
"""
