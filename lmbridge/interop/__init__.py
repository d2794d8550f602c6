"""Models for other frameworks, on top of an `LLMClient`.

Each module is for one framework, needs the extra that installs it, and is imported by its own name:

- `lmbridge.interop.langchain`: `ChatLMBridge`, a chat model of LangChain.
- `lmbridge.interop.pydantic_ai`: `LMBridgeModel`, a model of pydantic-ai.
- `lmbridge.interop.openai_agents`: `LMBridgeModel`, a model of openai-agents.
- `lmbridge.interop.openai`: `openai_client`, for everything else that takes a client of openai-python.
"""
