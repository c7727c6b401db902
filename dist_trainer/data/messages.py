"""The messages of a conversation in a record, in OpenAI's format or ShareGPT's, and which of them are trained on."""

from __future__ import annotations

import json
from typing import Any

from dist_trainer.data.templates import BESIDE_MESSAGES, describe_type, missing_column
from dist_trainer.errors import DataError

Message = dict[str, Any]
ASSISTANT = "assistant"
FLAGS = ("weight", "train", "training")
"""Keys of a message that say whether to train on it: 1 or true, 0 or false."""
CONTENT_KEYS = (
    *("tool_calls", "function_call", "tools", "functions"),
    *("reasoning_content", "reasoning", "thinking", "refusal", "images", "audio", "videos"),
)
"""Keys of a message with other content. The chat template must render them, or they would be lost silently."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def read_messages(where: str, record: dict[str, Any], column: str) -> list[Message]:
    """The messages of a record. Raises DataError naming `where` and the problem."""
    if column not in record:
        raise missing_column(column, list(record), where)
    messages = record[column]
    if isinstance(messages, dict) and messages and all(isinstance(part, list) for part in messages.values()):
        # `datasets` stores lists of records declared as a Sequence as a list per field.
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list):
        raise DataError(
            f'{where}: the column {column!r} holds {describe_type(messages)}, not a list of {{"role", "content"}} messages'
        )
    if not messages:
        raise DataError(f"{where}: the conversation in {column!r} has no message; remove the record")
    for other in BESIDE_MESSAGES:
        if other != column and record.get(other) not in (None, "", "[]", []):
            raise DataError(
                f"{where}: the column {other!r} has content that would not be part of the conversation; write it into a "
                "system message, and remove the column"
            )
    return [_message(where, f"message {number} in {column!r}", message) for number, message in enumerate(messages, start=1)]


def is_trained_on(message: Message) -> bool:
    """Whether it is an answer of the assistant that is neither excluded by a flag nor empty."""
    has_content = message["content"].strip() or any(message.get(key) for key in CONTENT_KEYS)
    return message["role"] == ASSISTANT and bool(has_content) and all(message.get(flag, True) for flag in FLAGS)


def _message(where: str, name: str, message: Any) -> Message:
    """The message, with "role" and "content" as text and valid flags. Raises DataError naming the record and message."""
    if not isinstance(message, dict):
        raise DataError(f'{where}: {name} is {describe_type(message)}, not an object with "role" and "content"')
    # In tables, each message has the fields of all messages, null where unused.
    message = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(where, name, message)
    if message.get("content") is None and (message.get("tool_calls") or message.get("function_call")):
        message["content"] = ""
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            what = f"holds {describe_type(message[key])}, not text" if key in message else f"is missing ({', '.join(message)})"
            raise DataError(f'{where}: "{key}" of {name} {what}; each message needs "role" and "content"')
    for flag in FLAGS:
        if message.get(flag, 0) not in (0, 1):
            raise DataError(
                f'{where}: "{flag}" of {name} is {message[flag]!r}; it must be 1 or true (trained on), or 0 or false (not)'
            )
        if message.get(flag) and message["role"] != ASSISTANT:
            raise DataError(
                f'{where}: "{flag}" of {name} asks to train on a message of the {message["role"]}, but only messages of '
                f"the {ASSISTANT} are trained on; remove it, or set it to 0"
            )
    return message


def _from_sharegpt(where: str, name: str, message: Message) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(f'{where}: {name} is "from" {speaker!r}; known are {", ".join(SHAREGPT_ROLES)}')
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[speaker], "content": message.get("value"), **others}


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object. OpenAI's are a JSON string, but templates convert to JSON themselves."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}
