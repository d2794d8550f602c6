"""The MCP layer (extra `mcp`): MCP servers' tools in, the bridge's tools out. Empty until its release."""
