"""lmbridge as an MCP server: the tools that it offers to a host program."""
