"""Prompt and completion as what a reward model reads: a chat, one plain text, or a pair of texts."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from gopo_lightning.types import Prompt

Template: TypeAlias = Literal["auto", "chat", "plain"]
ScoredTemplate: TypeAlias = Literal["auto", "chat", "plain", "pair"]


def scored_texts(
    tokenizer: PreTrainedTokenizerBase, template: ScoredTemplate, prompts: Sequence[Prompt], completions: Sequence[str]
) -> tuple[Sequence[str | tuple[str, str]], bool]:
    """What the model reads, and whether the tokenizer still has to add special tokens."""
    together = list(zip(prompts, completions, strict=True))
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        return [_chat(tokenizer, *both) for both in together], False
    if template == "pair":
        return [(_plain(prompt), completion) for prompt, completion in together], True
    return [_plain(prompt) + ("" if prompt.messages is None else "\n") + text for prompt, text in together], True


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> str:
    """The conversation with the completion as its last turn; a plain prompt is a user's turn."""
    messages: list[dict[str, Any]] = list(map(dict, prompt.messages or [{"role": "user", "content": prompt.text}]))
    rendered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion}], tokenize=False)
    assert isinstance(rendered, str)
    return rendered


def _plain(prompt: Prompt) -> str:
    """The contents of a conversation are joined by newlines."""
    if prompt.messages is None:
        return prompt.text
    return "\n".join(str(message["content"]) for message in prompt.messages)
