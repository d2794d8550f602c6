"""An MCP server on stdio whose tools and faults are given as JSON in its first argument: `{"hang": true}`.

It is a separate program, and imports only the standard library, so that it starts in 20 ms. These are its options.

About the list of tools: `tools` (names to offer in place of all), `more_tools` (further definitions), `idempotent`
(names of tools with that hint), `page` (definitions on a page), `endless` (the list returns to its first page),
`no_tools` and `undeclared` (no tools, or no declaration of them), `list_refused` (the list is refused once after a
change), `unannounced` (no declaration and no notification of changes), `ttl` (the `ttlMs` of each page), `listed` (add
a line to the notes for each page). A call of `change` adds the tool `new`, or `clashing` if that is set, and one of
`redefine` changes the description of `echo`, as does the existence of the file `changed_after`.

About calls, each a list of names of tools: `noted` (add a line to the notes), `die_at` (exit with status 7; only the
first time if `once` is a path), `deaf_at` (close stdin), `deep_at` (return a deeply nested result). `size` is the
number of bytes in the result of `big`. `work` reports progress `reports` times, every `pause` seconds, and then ends
unless `reports` is negative, which means for ever, or `hangs` is set.

The result of `meta`, if `tools` has it, is the metadata of the call. A call of `ask` sends the `question` (the
parameters of `elicitation/create`), and its result is the reply as JSON; with `withdraws`, the question is cancelled at
once, and with `leaves`, the call is answered without waiting for the reply. A call of `visit` is refused until there
was one before, with the `urls` that the user should visit first, and with `visited`, the visit of them is reported.

About messages that are not as the protocol says: `answers` (messages, or lines, to send in place of the answer to a
method, or to the call of a tool; "$id" stands for the id of the request, and "$text_id" for the same as a text),
`flood_of` (a message that is sent without end from a call of `flood` on, or from the start with `floods_at_once`),
`first` (messages to send before all others).

About the process: `notes` (the path of a file to which lines are added), `starts` (add a line at the start), `name`,
`hang` (never answer `initialize`), `exit` (exit with that status at once), `die_after_list`, `grandchild` (start a
process that ignores SIGTERM), `ignore_term`, `ignore_eof`, `flood` (write so many bytes to stderr), `garbage` (write
lines that are not messages), `unterminated` (write text before a message on its line).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
EMPTY: dict[str, Any] = {"type": "object", "properties": {}}
TEXT: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NAMES = ["echo", "die", "sleep", "big", "fails", "refuses", "nothing", "env", "count", "progress", "change", "parts"]

lock = threading.Lock()
added: list[dict[str, Any]] = []
descriptions: dict[str, str] = {}
asking: list[Any] = []
SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def send(message: dict[str, Any]) -> None:
    raw(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")


def raw(data: bytes) -> None:
    with lock:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def send_instead(answers: list[Any], request_id: Any) -> None:
    """Sends messages as they are given, with the id of a request in place of "$id"."""
    for answer in answers:
        line = answer if isinstance(answer, str) else json.dumps(answer)
        line = line.replace('"$id"', json.dumps(request_id)).replace("$text_id", str(request_id))
        raw(line.encode() + b"\n")


def start_flood(message: Any) -> None:
    """Writes a message without end, in a thread."""
    threading.Thread(target=flood, args=[message], daemon=True).start()


def flood(message: Any) -> None:
    data = (json.dumps(message) + "\n").encode() * 100
    while True:
        raw(data)


def note(text: str) -> None:
    """Adds a line to the file that a test reads."""
    with Path(OPTIONS["notes"]).open("a") as file:
        file.write(text + "\n")


def tools() -> list[Any]:
    if OPTIONS.get("changed_after") and Path(OPTIONS["changed_after"]).exists():
        descriptions["echo"] = "Does something else."
    names = OPTIONS.get("tools", NAMES)
    made = [
        {"name": name, "description": descriptions.get(name, f"Does {name}."), "inputSchema": EMPTY} for name in names
    ]
    for tool in made:
        if tool["name"] == "echo":
            tool["inputSchema"] = TEXT
        if tool["name"] in OPTIONS.get("idempotent", ()):
            tool["annotations"] = {"idempotentHint": True}
    return [*made, *OPTIONS.get("more_tools", []), *added]


def text(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": each} for each in texts], **fields}


def call(request_id: Any, name: str, arguments: dict[str, Any], meta: dict[str, Any]) -> None:
    if name in OPTIONS.get("noted", ()):
        note(name)
    if name in OPTIONS.get("die_at", ()):
        sys.stderr.write("dying on request\n")
        sys.stderr.flush()
        if OPTIONS.get("once") and Path(OPTIONS["once"]).exists():
            return send({"id": request_id, "result": text("alive again")})
        if OPTIONS.get("once"):
            Path(OPTIONS["once"]).touch()
        os._exit(7)
    if name in OPTIONS.get("deaf_at", ()):
        os.close(0)
        time.sleep(600)
    if name == "ask":
        asking.append(request_id)
        send({"id": f"question {request_id}", "method": "elicitation/create", "params": OPTIONS["question"]})
        if OPTIONS.get("withdraws"):
            send({"method": "notifications/cancelled", "params": {"requestId": f"question {request_id}"}})
        return send({"id": request_id, "result": text("left")}) if OPTIONS.get("leaves") else None
    if name == "visit" and not asking:
        asking.append(request_id)
        data = {"elicitations": OPTIONS["urls"]}
        send({"id": request_id, "error": {"code": -32042, "message": "visit it first", "data": data}})
        for each in OPTIONS["urls"] if OPTIONS.get("visited") else ():
            send({"method": "notifications/elicitation/complete", "params": {"elicitationId": each["elicitationId"]}})
        return None
    if name == "work":
        threading.Thread(target=work, args=(request_id, meta), daemon=True).start()
        return None
    result = text(str(arguments.get("text", name)))
    if name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "sleep":
        return None
    if name == "big":
        return raw(
            b'{"jsonrpc":"2.0","id":%d,"result":{"content":[],"x":"' % request_id + b"x" * OPTIONS["size"] + b'"}}\n'
        )
    if name == "fails":
        result = text("no such file: a.txt", isError=True)
        result["content"] += OPTIONS.get("failure_parts", [])
    if name == "refuses":
        return send({"id": request_id, "error": {"code": -32602, "message": "bad arguments"}})
    if name == "nothing":
        result = {}
    if name == "env":
        result = text(json.dumps(dict(os.environ)))
    if name in OPTIONS.get("deep_at", ()):
        value: dict[str, Any] = {}
        for _ in range(300):
            value = {"a": value}
        result = text(structuredContent=value)
    if name == "meta":
        result = text(json.dumps(meta))
    if name == "parts":
        result = text("one", "two")
    if name == "progress":
        params = {"progressToken": meta.get("progressToken"), "progress": 1, "total": 2, "message": "half"}
        send({"method": "notifications/progress", "params": params})
        send({"method": "notifications/message", "params": {"level": "info", "data": "at work"}})
    if name == "change":
        added.append({"name": OPTIONS.get("clashing", "new"), "description": "Is new.", "inputSchema": EMPTY})
    if name == "redefine":
        descriptions["echo"] = "Does something else."
    if name in ("change", "redefine") and not OPTIONS.get("unannounced"):
        send({"method": "notifications/tools/list_changed"})
    return send({"id": request_id, "result": result})


def work(request_id: Any, meta: dict[str, Any]) -> None:
    """Reports progress in a thread of its own, so that other messages are read meanwhile."""
    reports = OPTIONS.get("reports", 3)
    for number in itertools.count() if reports < 0 else range(reports):
        time.sleep(OPTIONS.get("pause", 0.05))
        params = {"progressToken": meta.get("progressToken"), "progress": number + 1}
        send({"method": "notifications/progress", "params": params})
    if not OPTIONS.get("hangs"):
        send({"id": request_id, "result": text("worked")})


def list_tools(request_id: Any, params: dict[str, Any]) -> None:
    size = OPTIONS.get("page")
    if OPTIONS.get("listed"):
        note("listed")
    if added and OPTIONS.pop("list_refused", False):
        return send({"id": request_id, "error": {"code": -32603, "message": "not now"}})
    every = tools()
    if OPTIONS.get("endless"):
        return send({"id": request_id, "result": {"tools": every, "nextCursor": "again"}})
    ttl = {"ttlMs": OPTIONS["ttl"]} if "ttl" in OPTIONS else {}
    if not size:
        return send({"id": request_id, "result": {"tools": every, **ttl}})
    begin = int(params.get("cursor", 0))
    result: dict[str, Any] = {"tools": every[begin : begin + size], **ttl}
    if begin + size < len(every):
        result["nextCursor"] = str(begin + size)
    return send({"id": request_id, "result": result})


def handle(message: dict[str, Any]) -> None:
    method, request_id, params = message.get("method"), message.get("id"), message.get("params") or {}
    answers = OPTIONS.get("answers", {})
    name = params.get("name") if method == "tools/call" else method
    if name in answers:
        send_instead(answers[name], request_id)
    elif name == "flood":
        start_flood(OPTIONS["flood_of"])
        send({"id": request_id, "result": text("flooding")})
    elif method == "initialize":
        if "notes" in OPTIONS and "question" in OPTIONS:
            note(f"capabilities {json.dumps(params['capabilities'])}")
        if OPTIONS.get("hang"):
            return
        if OPTIONS.get("unterminated"):
            raw(b"no line break here ")
        info = {"name": OPTIONS.get("name", "scripted"), "version": "1"}
        capabilities: dict[str, Any] = {"tools": {"listChanged": True}, "logging": {}}
        if OPTIONS.get("unannounced"):
            capabilities["tools"] = {}
        if OPTIONS.get("undeclared") or OPTIONS.get("no_tools"):
            del capabilities["tools"]
        version = params["protocolVersion"]
        send(
            {"id": request_id, "result": {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}}
        )
    elif method == "tools/list" and not OPTIONS.get("no_tools"):
        list_tools(request_id, params)
        if OPTIONS.get("die_after_list"):
            os._exit(0)
    elif method == "tools/call":
        call(request_id, params["name"], params.get("arguments") or {}, params.get("_meta") or {})
    elif method is None:
        if "notes" in OPTIONS:
            note(f"reply {json.dumps(message.get('result', message.get('error')))}")
        # A request of a flood is answered as well, but no call waits for that.
        if asking and not OPTIONS.get("leaves"):
            send({"id": asking.pop(), "result": text(json.dumps(message.get("result", message.get("error"))))})
    elif method == "notifications/cancelled" and "notes" in OPTIONS:
        note(f"cancelled {params.get('requestId')}")
    elif request_id is not None:
        send({"id": request_id, "error": {"code": -32601, "message": "no such method"}})


def begin() -> None:
    if OPTIONS.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if OPTIONS.get("grandchild"):
        command = [sys.executable, "-I", "-S", "-c", SLEEPER]
        note(f"grandchild {subprocess.Popen(command).pid}")
    if OPTIONS.get("starts"):
        note("started")
    if OPTIONS.get("exit") is not None:
        sys.stderr.write("\x1b[31mmissing\x1b[0m API_KEY\n")
        sys.exit(OPTIONS["exit"])
    if OPTIONS.get("flood"):
        sys.stderr.write("x" * 1000 + "\n" + "y" * OPTIONS["flood"] + "\n")
        sys.stderr.flush()
    send_instead(OPTIONS.get("first", []), None)
    if OPTIONS.get("floods_at_once"):
        start_flood(OPTIONS["flood_of"])
    if OPTIONS.get("garbage"):
        raw(b"Welcome!\n\n{not json}\n[1, 2]\n\xff\xfe\x00 bytes\n")


def main() -> None:
    begin()
    for line in sys.stdin:
        handle(json.loads(line))
    if OPTIONS.get("ignore_eof"):
        time.sleep(600)


if __name__ == "__main__":
    main()
