"""The MCP servers that lmbridge starts and connects to, and their tools as tools of an agent.

From the top: `hub` has the servers of a configuration file, `managed_server` starts and restarts one of them,
`session_owner` is the task that holds one session open, `stdio` and `server_process` run its process, and
`process_groups` and `guardian` make sure that no process is left behind. `definitions`, `results` and `sanitize` turn
what a server sends into tools and text.

Of the rest of `lmbridge.mcp`, this package imports only `config`, `sdk` and `jsonrpc`. `lmbridge.mcp.dynamic` imports
this package, and users import its public names from `lmbridge.mcp`.
"""
