"""A program that writes a log of its requests to a file, as JSON, with the standard logging module.

python log_requests.py requests.jsonl
"""

import asyncio
import json
import logging
import logging.config
import sys

from lmbridge import LLMClient, LLMError


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"logger": record.name, "level": record.levelname, "text": record.getMessage()})


def configure_logging(path: str) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonFormatter}},
            "handlers": {"file": {"class": "logging.FileHandler", "filename": path, "formatter": "json"}},
            "loggers": {"lmbridge": {"level": "DEBUG", "handlers": ["file"], "propagate": False}},
        }
    )


async def main() -> None:
    messages = [{"role": "user", "content": "my secret question"}]
    async with LLMClient(api_key="sk-secret-key", headers={"X-Token": "secret-header"}) as client:
        print(await client.ask("my secret question", max_tokens=8))
        async with client.stream_chat(messages, max_tokens=8, stream_options={"include_usage": True}) as stream:
            async for _ in stream.text():
                pass
        try:
            await client.chat_completion([{"role": "user", "content": "word " * 20_000}], max_retries=0)
        except LLMError as error:
            print(type(error).__name__)


configure_logging(sys.argv[1])
asyncio.run(main())
