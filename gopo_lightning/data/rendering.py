"""One row of a dataset -> ``Prompt``: what the policy reads.

A conversation goes through the tokenizer's chat template, which writes all special tokens itself, so none are added
again. A plain string is tokenised with the tokenizer's own special tokens (a BOS, if it has one; never an EOS at the
end). ``apply_chat_template`` says when a plain string becomes a user message.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gopo_lightning.data.sources import PromptSource
from gopo_lightning.structs import Prompt

Template = Literal["auto", "always", "never"]
Conversation = tuple[Mapping[str, Any], ...]


class PromptRenderer:
    """Row number and row -> ``Prompt``.

    Args:
        tokenizer: of the policy.
        source: names the column, and the file in errors.
        system_prompt: see ``PromptDataModule``, as the rest.
        apply_chat_template: when a plain string becomes a user message.
        chat_template_kwargs: arguments of the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: PromptSource,
        *,
        system_prompt: str | None = None,
        apply_chat_template: Template = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.system_prompt = system_prompt
        self.apply_chat_template = apply_chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._template_is_checked = False

    def __call__(self, index: int, row: Mapping[str, Any]) -> Prompt:
        """The prompt of row ``index``; raises ValueError, with row and file, on one that is malformed."""
        text, messages = self._conversation(index, row[self.source.column])
        if messages is None:
            token_ids = self._plain_tokens(text)
        else:
            self._check_template()
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
            token_ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        columns = {k: v for k, v in row.items() if k != self.source.column}
        return Prompt(index, tuple(token_ids), text, messages, columns)

    def _conversation(self, index: int, value: Any) -> tuple[str, Conversation | None]:
        """The plain text, and the messages that the template renders, or None."""
        if isinstance(value, list | tuple):
            return self._from_messages(index, value)
        self._require(isinstance(value, str), index, f"is a {type(value).__name__}, not a string or messages")
        self._require(bool(value.strip()), index, "is empty")
        wanted = bool(self.system_prompt or self.chat_template_kwargs)
        if self.apply_chat_template == "never" or (self.apply_chat_template == "auto" and not wanted):
            return value, None
        return value, self._with_system(({"role": "user", "content": value},))

    def _from_messages(self, index: int, messages: Sequence[Any]) -> tuple[str, Conversation]:
        for m in messages:
            well_formed = isinstance(m, Mapping) and isinstance(m.get("role"), str)
            self._require(well_formed, index, f"has a message without a role: {m!r:.80}")
            self._require(isinstance(m.get("content"), str), index, f"has a message without text: {m!r:.80}")
        kept = list(messages)
        while kept and kept[-1]["role"] == "assistant":
            kept.pop()
        from_user = [m["content"] for m in kept if m["role"] == "user"]
        self._require(bool(from_user), index, "has no user message before the answer")
        self._require(bool(from_user[-1].strip()), index, "ends in an empty user message")
        if self.apply_chat_template == "never":
            raise ValueError(
                f"row {index} of {self.source.path} is a conversation, which apply_chat_template='never' cannot "
                "render. Use 'auto', or name a column of strings."
            )
        return from_user[-1], self._with_system(tuple(kept))

    def _with_system(self, messages: Conversation) -> Conversation:
        if self.system_prompt is None:
            return messages
        own = messages[1:] if messages[0]["role"] == "system" else messages
        return ({"role": "system", "content": self.system_prompt}, *own)

    def _plain_tokens(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text)["input_ids"]
        end, end_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        closed = len(token_ids) > 1 and token_ids[-1] == end_id and not text.endswith(end)
        return token_ids[:-1] if closed else token_ids  # a prompt goes on: no EOS at its end

    def _check_template(self) -> None:
        if self._template_is_checked:
            return
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.source.path} needs a chat template (conversations, a system prompt, or apply_chat_template="
                "'always'), and the tokenizer has none. Use an instruction-tuned model, or plain prompts."
            )
        template = str(self.tokenizer.chat_template)
        if unknown := [key for key in self.chat_template_kwargs if key not in template]:
            raise ValueError(f"chat_template_kwargs {unknown} do not occur in the tokenizer's template. Remove them.")
        self._template_is_checked = True

    def _require(self, condition: bool, index: int, problem: str) -> None:
        if not condition:
            raise ValueError(
                f"row {index} (counted from 0) of {self.source.path}: column '{self.source.column}' {problem}. Fix "
                "or delete the row."
            )
