"""The port of `openai_original.py` to lmbridge: the same requests, and the same output."""

import json

from pydantic import BaseModel

from lmbridge import ContextLengthExceededError
from lmbridge.sync import LLMClient

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Returns the weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class City(BaseModel):
    name: str
    people: int


# The server and the model come from LMBRIDGE_API_BASE and LMBRIDGE_MODEL.
client = LLMClient(api_key="none", timeout=60, headers={"X-Team": "docs"})

print(client.list_models())

reply = client.chat_completion(
    [{"role": "user", "content": "Say hello."}],
    temperature=0,
    max_tokens=20,
    extra_headers={"X-Request-Source": "script"},
    extra_body={"top_k": 40},
)
print(reply["choices"][0]["message"]["content"])
usage = reply.get("usage")
print(usage.get("total_tokens") if usage else None)

with client.chat_completion([{"role": "user", "content": "Tell me a story."}], max_tokens=20, stream=True) as stream:
    for chunk in stream:
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="")
print()

reply = client.chat_completion(
    [{"role": "user", "content": "How is the weather in Oslo?"}], tools=TOOLS, tool_choice="required", max_tokens=60
)
for call in reply["choices"][0]["message"].get("tool_calls") or []:
    print(call["function"]["name"], json.loads(call["function"]["arguments"]))

city = client.parse([{"role": "user", "content": "Which city is the capital of Norway?"}], City, max_tokens=60)
print(type(city).__name__)

patient = client.with_options(timeout=600, max_retries=5)
raw = patient.with_raw_response.chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=5)
print(raw.status, raw.headers["content-type"])

try:
    client.chat_completion([{"role": "user", "content": "word " * 20_000}])
except ContextLengthExceededError as error:
    print("too long:", error.status)
