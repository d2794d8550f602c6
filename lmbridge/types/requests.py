"""What one sends in a chat: messages by role, their content parts, tools, and the choice among them.

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
    text: str


class ImageURL(TypedDict, total=False):
    """Where an image is."""

    url: Required[str]
    """A data URL, as `image_part` makes it. Few local servers fetch an image from the web."""
    detail: Literal["auto", "low", "high"]
    """How closely the model looks at the image, if the server knows this field."""


class ImagePart(TypedDict):
    """An image in a message. `image_part` makes one of a file."""

    type: Literal["image_url"]
    image_url: ImageURL


class AudioData(TypedDict):
    """A recording."""

    data: str
    """The file, as base64."""
    format: str
    """The format of the file: "wav" or "mp3"."""


class AudioPart(TypedDict):
    """A recording in a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class FileData(TypedDict, total=False):
    """A file, by its content or by its id."""

    file_data: str
    """The file, as a data URL."""
    file_id: str
    """The id of a file that the server has."""
    filename: str


class FilePart(TypedDict):
    """A file in a message, for example a PDF."""

    type: Literal["file"]
    file: FileData


class RefusalPart(TypedDict):
    """A refusal of the model, in an assistant message that is sent back."""

    type: Literal["refusal"]
    refusal: str


ContentPart: TypeAlias = TextPart | ImagePart | AudioPart | FilePart
"""A part of the content of a user message."""


# Messages


class SystemMessage(TypedDict, total=False):
    """Instructions that stand above the conversation."""

    role: Required[Literal["system"]]
    content: Required[str | Sequence[TextPart]]
    name: str


class DeveloperMessage(TypedDict, total=False):
    """Instructions, as newer models of OpenAI call them. Most local servers know only `system`."""

    role: Required[Literal["developer"]]
    content: Required[str | Sequence[TextPart]]
    name: str


class UserMessage(TypedDict, total=False):
    """What the user says, as a text or as parts."""

    role: Required[Literal["user"]]
    content: Required[str | Sequence[ContentPart]]
    name: str


class AssistantMessage(TypedDict, total=False):
    """What the model said, or what you want it to have said. `content` may be None beside `tool_calls`."""

    role: Required[Literal["assistant"]]
    content: str | Sequence[TextPart | RefusalPart] | None
    refusal: str | None
    name: str
    tool_calls: Sequence[MessageToolCall]
    function_call: FunctionCall | None
    reasoning_content: str | None
    audio: Mapping[str, Any] | None
    """The `id` of an earlier reply in sound."""


class ToolMessage(TypedDict):
    """The result of a tool call."""

    role: Literal["tool"]
    content: str | Sequence[TextPart]
    tool_call_id: str
    """The `id` of the call."""


ChatMessage: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | Message
"""A message of a chat, of any role. The message of a reply is one, too, so it can be appended as it is."""


# Tools


class FunctionDefinition(TypedDict, total=False):
    """A function that the model may call."""

    name: Required[str]
    description: str
    parameters: Mapping[str, Any]
    """The JSON schema of the arguments: an object."""
    strict: bool | None


class ToolDefinition(TypedDict):
    """A tool, as a chat completion takes it: an entry of `tools`."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(TypedDict):
    """The name of a function."""

    name: str


class NamedToolChoice(TypedDict):
    """Makes the model call this function."""

    type: Literal["function"]
    function: FunctionName


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedToolChoice
"""Whether the model may, or must, call a tool: the value of `tool_choice`."""


# The form of the answer


class TextFormat(TypedDict):
    """Asks for any text, which is the default."""

    type: Literal["text"]


class JSONObjectFormat(TypedDict):
    """Asks for some JSON object."""

    type: Literal["json_object"]


class JSONSchema(TypedDict, total=False):
    """A JSON schema with a name."""

    name: Required[str]
    description: str
    schema: Mapping[str, Any]
    strict: bool | None


class JSONSchemaFormat(TypedDict):
    """Asks for a JSON object with this schema. `LLMClient.parse` does so, and reads the answer."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat: TypeAlias = TextFormat | JSONObjectFormat | JSONSchemaFormat
"""The form that the answer is to have: the value of `response_format`."""
