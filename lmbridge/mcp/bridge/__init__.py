"""lmbridge as an MCP server: the tools that it offers to an MCP host, such as Claude Code or LM Studio."""
