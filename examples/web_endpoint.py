"""A web endpoint that streams an answer, and stops the model when the browser leaves.

    pip install fastapi uvicorn
    uvicorn --app-dir examples web_endpoint:app
    curl -N 'http://127.0.0.1:8000/ask?question=Why+is+the+sky+blue'    # Ctrl-C stops the model

It uses the server of LMBRIDGE_API_BASE, or LM Studio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from lmbridge import ChatStream, LLMClient, LLMError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Opens one client for all requests, and closes it with the application."""
    async with LLMClient() as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


async def text_of(stream: ChatStream) -> AsyncIterator[str]:
    """Yields the text. FastAPI cancels it when the browser has left, and leaving the stream stops the server."""
    async with stream:
        try:
            async for chunk in stream:
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
        except LLMError as error:
            # The status has been sent already, so the page has to say that its answer is not whole.
            yield f"\n[the answer ends here: {error}]"


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    """Answers a question. If there is no answer at all, the browser gets a status that says so."""
    try:
        stream = await app.state.client.chat_completion([{"role": "user", "content": question}], stream=True)
    except LLMError as error:
        raise HTTPException(502, str(error)) from error
    return StreamingResponse(text_of(stream), media_type="text/plain")
