"""Conversations as data sets write them -> messages with role and content; a prompt and its answer as one text."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = tuple[Message, ...]

_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""ShareGPT's `from` -> role."""
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


def messages_of(value: Any) -> Conversation:
    """The messages of a list of them, or of a single one.

    A message has `role` and `content`, or `from` and `value` (ShareGPT); its content is a string, or a list of parts
    that are all text, which are joined. Other keys stay where they are not null.

    >>> messages_of([{"from": "human", "value": "hi"}])
    ({'role': 'user', 'content': 'hi'},)

    Raises:
        ValueError: a message without role or text; the error is the second half of a sentence about the column.
    """
    messages = [value] if isinstance(value, Mapping) else value
    return tuple(map(_message, messages))


def parsed_messages(text: str) -> Sequence[Message] | None:
    """The list that ``text`` holds, where it is one of messages; None for any other text.

    As JSON, or as Python writes it, which pandas puts into CSV files.

    >>> parsed_messages("[{'role': 'user', 'content': 'hi'}]")
    [{'role': 'user', 'content': 'hi'}]

    Raises:
        ValueError: it looks like messages, but cannot be read; the error is the second half of a sentence.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        if not _PYTHON_MESSAGES.match(text):
            return None
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"looks like messages, but is no JSON: {text!r:.80}. Write them as JSON") from None
    of_messages = (
        isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "from"} & {*m} for m in value)
    )
    return value if of_messages else None


def _message(message: Any) -> Message:
    keys: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    role = keys.get("role")
    if role is None and keys.get("from") is not None:
        role = _SPEAKERS.get(str(keys["from"]).lower())
        if role is None:
            raise ValueError(f"has a message from {keys['from']!r:.80}; the known speakers are {sorted(_SPEAKERS)}")
    if not isinstance(role, str):
        raise ValueError(f"has a message without a role: {message!r:.80}")
    content = keys.get("content") if keys.get("content") is not None else keys.get("value")
    if isinstance(content, list | tuple) and all(map(_is_text, content)):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"has a message without text: {message!r:.80}")
    others = {k: v for k, v in keys.items() if k not in ("role", "content", "from", "value") and v is not None}
    return {"role": role, "content": content, **others}


def _is_text(part: Any) -> bool:
    if isinstance(part, Mapping):
        return part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
    return isinstance(part, str)


def normalised(text: str) -> str:
    """``text`` with a single space for each run of white space, and none at its ends."""
    return " ".join(text.split())


def identity(value: str | Conversation) -> tuple[tuple[str, str], ...]:
    """What makes prompts the same: roles and texts up to white space. A text is a user's message."""
    messages: Conversation = ({"role": "user", "content": value},) if isinstance(value, str) else value
    return tuple((message["role"], normalised(message["content"])) for message in messages)


def repeats(prompt: str, texts: Sequence[str]) -> bool:
    """Whether what all ``texts`` begin with holds ``prompt``, up to white space."""
    ordered = sorted(map(normalised, texts))
    first, last = ordered[0], ordered[-1]  # all the others lie between, and so begin as these two do
    n = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return normalised(prompt) in first[:n]


def continued(prompt: Conversation, answer: Conversation) -> Conversation:
    """``prompt`` and ``answer`` as one conversation, in which nothing stands twice.

    The answer may be the last turn alone, several turns that go on from the prompt, or the whole dialogue, with the
    prompt as all of it or some of its turns; a system message of either comes first.

    Raises:
        ValueError: two different system messages; or a dialogue that neither holds nor continues the prompt.
    """
    system, before = _system_apart(prompt)
    own_system, turns = _system_apart(answer)
    if system and own_system and identity(system) != identity(own_system):
        raise ValueError(
            f"its system message {own_system[0]['content']!r:.80} is not that of the prompt, "
            f"{system[0]['content']!r:.80}. Keep one of them"
        )
    asked, said = identity(before), identity(turns)
    num_read = max((n for n, (role, _) in enumerate(said, start=1) if role != "assistant"), default=0)
    context = said[:num_read]  # all but the answer
    if _holds(context, asked):
        joined = turns
    elif context and asked[-num_read:] == context:
        joined = (*before, *turns[num_read:])
    elif not {*context} & {*asked} and (not asked or not said or "assistant" in (said[0][0], asked[-1][0])):
        joined = (*before, *turns)
    else:
        raise ValueError(
            f"its dialogue begins with {said[0][1]!r:.80}, and neither holds nor continues the prompt "
            f"{asked[-1][1]!r:.80}"
        )
    return (*(system or own_system), *joined)


def _system_apart(messages: Conversation) -> tuple[Conversation, Conversation]:
    """The leading system message, if there is one, and the turns."""
    num_first = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:num_first], messages[num_first:]


def _holds(context: Sequence[Any], asked: Sequence[Any]) -> bool:
    """Whether ``asked`` stands in ``context``, in one piece."""
    n = len(asked)
    return bool(n) and any(context[start : start + n] == asked for start in range(len(context) - n + 1))


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The conversation as the tokenizer's chat template writes it.

    Raises:
        ValueError: the template refuses it, such as a role or an order of roles that it does not know.
    """
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
    except (TemplateError, TypeError) as error:  # a TypeError: of an expression in the template
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"the chat template refuses the conversation with the roles {roles}: {error}. Leave out what it refuses, "
            "or use a chat template that takes it."
        ) from error


def without_end(tokenizer: Any, token_ids: list[int], text: str) -> list[int]:
    """``token_ids`` of ``text`` without the EOS that a tokenizer puts at the end: the text goes on."""
    closed = len(token_ids) > 1 and token_ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return token_ids[:-1] if closed else token_ids


def check_unicode(text: str) -> None:
    """ValueError for half a surrogate pair, as cut-off JSON escapes leave it: no tokenizer reads one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character (a lone surrogate, {text[error.start]!r}) at position {error.start} of the text "
            f"…{text[max(error.start - 40, 0) : error.start]!r}. Repair or remove it."
        ) from error
