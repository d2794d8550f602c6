"""Configuration files that name MCP servers: where they are found, how they are parsed, and what an entry means.

This package is the lowest layer of `lmbridge.mcp`: it imports nothing from the other folders, needs no MCP SDK, and
starts nothing. `sdk`, `servers` and `dynamic` import it.
"""
