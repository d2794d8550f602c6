"""The parts of a chat request: messages by role, content parts, tools, `tool_choice` and `response_format`.

The annotations are evaluated (there is no `from __future__ import annotations` here), because a TypedDict whose
annotations are strings does not know at run time which of its fields are required.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypeAlias, TypedDict

from lmbridge.types.replies import FunctionCall, Message, MessageToolCall

# Content parts


class TextPart(TypedDict):
    """A text among other parts of a message."""

    type: Literal["text"]
    """The kind of part: "text"."""
    text: str
    """The text of the part."""


class ImageURL(TypedDict, total=False):
    """The image itself as a data URL, or its address."""

    url: Required[str]
    """A data URL, as `image_part` makes it. Few local servers fetch an image from the web."""
    detail: Literal["auto", "low", "high"]
    """How closely the model looks at the image, if the server knows this field."""


class ImagePart(TypedDict):
    """An image in a message. `image_part` makes one from a file."""

    type: Literal["image_url"]
    """The kind of part: "image_url"."""
    image_url: ImageURL
    """Where the image is."""


class AudioData(TypedDict):
    """A recording."""

    data: str
    """The file, as base64."""
    format: str
    """The format of the file: "wav" or "mp3"."""


class AudioPart(TypedDict):
    """A recording in a message."""

    type: Literal["input_audio"]
    """The kind of part: "input_audio"."""
    input_audio: AudioData
    """The recording itself."""


class FileData(TypedDict, total=False):
    """A file, by its content or by its id."""

    file_data: str
    """The file, as a data URL."""
    file_id: str
    """The id of a file that the server has."""
    filename: str
    """The name of the file, which the model may see."""


class FilePart(TypedDict):
    """A file in a message, for example a PDF."""

    type: Literal["file"]
    """The kind of part: "file"."""
    file: FileData
    """The file itself, or its id."""


class RefusalPart(TypedDict):
    """A refusal of the model, in an assistant message that is sent back."""

    type: Literal["refusal"]
    """The kind of part: "refusal"."""
    refusal: str
    """The model's words."""


ContentPart: TypeAlias = TextPart | ImagePart | AudioPart | FilePart
"""A part of the content of a user message."""


# Messages


class SystemMessage(TypedDict, total=False):
    """Instructions for the whole conversation."""

    role: Required[Literal["system"]]
    """The role of the author: "system"."""
    content: Required[str | Sequence[TextPart]]
    """The instructions, as a text or as text parts."""
    name: str
    """A name of the author, to distinguish several of the same role."""


class DeveloperMessage(TypedDict, total=False):
    """Instructions, as newer models of OpenAI call them. Most local servers know only `system`."""

    role: Required[Literal["developer"]]
    """The role of the author: "developer"."""
    content: Required[str | Sequence[TextPart]]
    """The instructions, as a text or as text parts."""
    name: str
    """A name of the author, to distinguish several of the same role."""


class UserMessage(TypedDict, total=False):
    """What the user says, as a text or as parts."""

    role: Required[Literal["user"]]
    """The role of the author: "user"."""
    content: Required[str | Sequence[ContentPart]]
    """What the user says: a text, or parts such as texts and images."""
    name: str
    """A name of the author, to distinguish several of the same role."""


class AssistantMessage(TypedDict, total=False):
    """What the model said, or what you want it to have said. `content` may be None if there are `tool_calls`."""

    role: Required[Literal["assistant"]]
    """The role of the author: "assistant"."""
    content: str | Sequence[TextPart | RefusalPart] | None
    """The answer; None if the model only called tools."""
    refusal: str | None
    """The model's words if it refused to answer; None if it did not."""
    name: str
    """A name of the author, to distinguish several of the same role."""
    tool_calls: Sequence[MessageToolCall]
    """The calls that the model requested. Each of them has to be answered by a tool message."""
    function_call: FunctionCall | None
    """The only call, for servers that do not know `tool_calls` yet."""
    reasoning_content: str | None
    """The reasoning before the answer, for servers that want it back."""
    audio: Mapping[str, Any] | None
    """A dict with the `id` of an earlier audio reply."""


class ToolMessage(TypedDict):
    """The result of a tool call."""

    role: Literal["tool"]
    """The role of the author: "tool"."""
    content: str | Sequence[TextPart]
    """The result of the call, as a text or as text parts."""
    tool_call_id: str
    """The `id` of the call."""


ChatMessage: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | Message
"""A message of a chat, of any role. It may also be the message of a reply, which can be appended without changes."""


# Tools


class FunctionDefinition(TypedDict, total=False):
    """A function that the model may call."""

    name: Required[str]
    """The name of the function: letters, digits, `_` and `-`, at most 64 of them."""
    description: str
    """A description of the function for the model."""
    parameters: Mapping[str, Any]
    """The JSON schema of the arguments: an object."""
    strict: bool | None
    """Whether the server enforces the schema of the arguments, if it can."""


class ToolDefinition(TypedDict):
    """A tool, as a chat completion takes it: an entry of `tools`."""

    type: Literal["function"]
    """The kind of tool: "function"."""
    function: FunctionDefinition
    """The function, with the schema of its arguments."""


class FunctionName(TypedDict):
    """The name of a function."""

    name: str
    """The name, as in the definition of the tool."""


class NamedToolChoice(TypedDict):
    """Makes the model call this function."""

    type: Literal["function"]
    """The kind of tool: "function"."""
    function: FunctionName
    """The function that the model has to call."""


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedToolChoice
"""Whether the model may, or must, call a tool: the value of `tool_choice`."""


# The form of the answer


class TextFormat(TypedDict):
    """Asks for any text, which is the default."""

    type: Literal["text"]
    """The kind of answer: "text"."""


class JSONObjectFormat(TypedDict):
    """Asks for any JSON object."""

    type: Literal["json_object"]
    """The kind of answer: "json_object"."""


class JSONSchema(TypedDict, total=False):
    """A JSON schema with a name."""

    name: Required[str]
    """A name for the schema: letters, digits, `_` and `-`."""
    description: str
    """A description of the answer's purpose for the model."""
    schema: Mapping[str, Any]
    """The JSON schema itself."""
    strict: bool | None
    """Whether the server enforces the schema, if it can."""


class JSONSchemaFormat(TypedDict):
    """Asks for a JSON object with this schema. `LLMClient.parse` does so, and reads the answer."""

    type: Literal["json_schema"]
    """The kind of answer: "json_schema"."""
    json_schema: JSONSchema
    """The schema and its name."""


ResponseFormat: TypeAlias = TextFormat | JSONObjectFormat | JSONSchemaFormat
"""The form that the answer is to have: the value of `response_format`."""
