"""The command line, `lmbridge` and `python -m lmbridge` (extra `cli`).

`application.py` lists the commands. Each command is a module with a function that declares its arguments, for typer,
and a coroutine that does the work. What they share: `options.py` (options of several commands), `connection.py`
(finding a server), `command_runner.py` (signals, errors, exit statuses), `terminal.py` (everything that is written).

typer was chosen over argparse because it generates the completion for three shells and reads the arguments from type
hints. rich shows tables and live views. prompt_toolkit is the line editor of `chat`: unlike `input()`, it has a
history, accepts several lines, and does not send pasted text at its first line break.
"""
