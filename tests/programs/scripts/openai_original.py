"""A script as a user of openai-python has it. `openai_port.py` is the same script for lmbridge."""

import json
import os

import openai
from openai import OpenAI
from pydantic import BaseModel

MODEL = os.environ["LMBRIDGE_MODEL"]
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


client = OpenAI(
    base_url=os.environ["LMBRIDGE_API_BASE"], api_key="none", timeout=60, default_headers={"X-Team": "docs"}
)

print([model.id for model in client.models.list()])

reply = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Say hello."}],
    temperature=0,
    max_tokens=20,
    extra_headers={"X-Request-Source": "script"},
    extra_body={"top_k": 40},
)
print(reply.choices[0].message.content)
print(reply.usage.total_tokens if reply.usage else None)

stream = client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=20, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
print()

reply = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "How is the weather in Oslo?"}],
    tools=TOOLS,
    tool_choice="required",
    max_tokens=60,
)
for call in reply.choices[0].message.tool_calls or []:
    print(call.function.name, json.loads(call.function.arguments))

parsed = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": "Which city is the capital of Norway?"}],
    response_format=City,
    max_tokens=60,
)
print(type(parsed.choices[0].message.parsed).__name__)

patient = client.with_options(timeout=600, max_retries=5)
raw = patient.chat.completions.with_raw_response.create(
    model=MODEL, messages=[{"role": "user", "content": "Say hello."}], max_tokens=5
)
print(raw.status_code, raw.headers["content-type"])

try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
except openai.BadRequestError as error:
    print("too long:", error.status_code)
