"""One row of a dataset -> ``Prompt``: what the policy reads.

A conversation goes through the tokenizer's chat template, which writes all special tokens itself, so none are added
again. A plain string is tokenised with the tokenizer's own special tokens (a BOS, if it has one; never an EOS at the
end). ``apply_chat_template`` says when a plain string becomes a user message.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from gopo_lightning.data.cells import is_blank
from gopo_lightning.data.conversations import (
    Conversation,
    apply_template,
    check_unicode,
    messages_of,
    parsed_messages,
    without_end,
)
from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.types import Prompt

Template = Literal["auto", "always", "never"]

_FOR_TEMPLATES = ("tools", "documents")
"""Columns of other libraries' data sets that a chat template reads beside the messages."""


class _Written(NamedTuple):
    """A row as text."""

    text: str
    """The plain text, or the last user turn."""
    messages: Conversation | None
    """What the template has rendered, if it has."""
    read: str
    """What the tokenizer reads."""


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
        self._template_is_checked = self._answer_is_told = False

    def __call__(self, index: int, row: Mapping[str, Any]) -> Prompt:
        """The prompt of row ``index``; raises ValueError, with row and file, on one that is malformed."""
        written = self._write(index, row)
        (token_ids,) = self._tokens([written])
        columns = {k: v for k, v in row.items() if k != self.source.column}
        return Prompt(index, tuple(token_ids), written.text, written.messages, columns, self.source.path)

    def token_ids(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[list[int]]:
        """Of the prompts of ``rows``, (index, row) each, tokenised together; raises as a call does."""
        return self._tokens([self._write(index, row) for index, row in rows])

    @property
    def identity(self) -> str | None:
        """A digest of all on which the tokens of a row depend; None where that cannot be told.

        It cannot for a tokenizer without a Rust backend, nor for a template that writes the date.
        """
        backend, template = getattr(self.tokenizer, "backend_tokenizer", None), str(self.tokenizer.chat_template)
        if backend is None or _writes_date(template):
            return None
        source = self.source
        digest = Digest()
        digest.add([type(self.tokenizer).__qualname__, backend.to_str(), template, str(self.tokenizer)])
        digest.add([source.prompt_column, source.messages_column, source.system_column])
        digest.add([self.system_prompt, self.apply_chat_template, self.chat_template_kwargs])
        return digest.value

    def _write(self, index: int, row: Mapping[str, Any]) -> "_Written":
        text, messages = self._conversation(index, row[self.source.column], self._system(index, row))
        read = text
        if messages is not None:
            self._check_template(row)
        with self._place(index):
            if messages is not None:
                read = apply_template(self.tokenizer, messages, add_generation_prompt=True, **self.chat_template_kwargs)
            check_unicode(read)
        return _Written(text, messages, read)

    def _tokens(self, written: Sequence["_Written"]) -> list[list[int]]:
        """A template writes all special tokens itself."""
        found: dict[int, list[int]] = {}
        for plain in (True, False):
            those = [number for number, each in enumerate(written) if (each.messages is None) == plain]
            if those:
                texts = [written[number].read for number in those]
                token_ids = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
                opened = map(partial(without_end, self.tokenizer), token_ids, texts) if plain else token_ids
                found |= zip(those, opened, strict=True)
        return [found[number] for number in range(len(written))]

    def _system(self, index: int, row: Mapping[str, Any]) -> str | None:
        """The system message that is put first, if there is one; the option's replaces the row's."""
        if self.system_prompt is not None or self.source.system_column is None:
            return self.system_prompt
        value = row[self.source.system_column]
        is_text = value is None or isinstance(value, str)
        self._require(is_text, index, f"is a {type(value).__name__}, not a text", self.source.system_column)
        return value if value and value.strip() else None

    def _conversation(self, index: int, value: Any, system: str | None) -> tuple[str, Conversation | None]:
        """The plain text, and the messages that the template renders, or None."""
        try:
            parsed = parsed_messages(value) if isinstance(value, str) else None
        except ValueError as error:
            self._require(False, index, str(error))
        if parsed is not None:
            is_named = self.source.messages_column is not None
            remedy = f"as text, but is read as a prompt. Set messages_column: {self.source.column}"
            self._require(is_named, index, f"holds messages {remedy}")
            value = parsed
        if isinstance(value, list | tuple):
            return self._from_messages(index, value, system)
        if self.source.messages_column is not None:
            self._require(
                False, index, f"is a {type(value).__name__}, not messages or JSON text of them: {value!r:.80}"
            )
        self._require(isinstance(value, str), index, f"is a {type(value).__name__}, not a string or messages")
        self._require(bool(value.strip()), index, "is empty")
        wanted = system is not None or bool(self.source.system_column or self.chat_template_kwargs)
        if self.apply_chat_template == "never" or (self.apply_chat_template == "auto" and not wanted):
            return value, None
        return value, _with_system(({"role": "user", "content": value},), system)

    def _from_messages(self, index: int, messages: Sequence[Any], system: str | None) -> tuple[str, Conversation]:
        try:
            kept = list(messages_of(messages))
        except ValueError as error:
            self._require(False, index, str(error))
        given = len(kept)
        while kept and kept[-1]["role"] == "assistant":
            kept.pop()
        if len(kept) < given and self.source.messages_column is None and not self._answer_is_told:
            self._answer_is_told = True
            rank_zero_warn(
                f"prompts of {self.source.path} end with an assistant's message, as row {index} does: it is left out, "
                "and the policy writes an answer of its own."
            )
        from_user = [m["content"] for m in kept if m["role"] == "user"]
        self._require(bool(from_user), index, "has no user message before the answer")
        self._require(bool(from_user[-1].strip()), index, "ends in an empty user message")
        if self.apply_chat_template == "never":
            raise ValueError(
                f"row {index} of {self.source.path} is a conversation, which apply_chat_template='never' cannot "
                "render. Use 'auto', or name a column of strings."
            )
        return from_user[-1], _with_system(tuple(kept), system)

    def _check_template(self, row: Mapping[str, Any]) -> None:
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
        if _writes_date(template) and not any("date" in key for key in self.chat_template_kwargs):
            rank_zero_warn(
                "the tokenizer's chat template writes today's date into the prompts. Resumed on another day, a run "
                "reads other prompts and is refused unless data.init_args.on_data_change is warn. If the template "
                "takes a date, give it in data.init_args.chat_template_kwargs."
            )
        unread = [name for name in _FOR_TEMPLATES if name in template and not is_blank(row.get(name))]
        if unread:
            rank_zero_warn(
                f"{self.source.path} has columns {unread}, which the chat template would write into the prompt, but it "
                "gets messages alone. Write such prompts into a column of texts yourself (apply_chat_template: never)."
            )
        self._template_is_checked = True

    def _require(self, condition: bool, index: int, problem: str, column: str | None = None) -> None:
        if not condition:
            raise ValueError(
                f"row {index} (counted from 0) of {self.source.path}: column '{column or self.source.column}' "
                f"{problem}. Fix or delete the row."
            )

    @contextmanager
    def _place(self, index: int) -> Iterator[None]:
        """A ValueError inside says which row it is about."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"row {index} (counted from 0) of {self.source.path}: {error}") from error


def _writes_date(template: str) -> bool:
    return "strftime_now" in template


def _with_system(messages: Conversation, system: str | None) -> Conversation:
    if system is None:
        return messages
    own = messages[1:] if messages[0]["role"] == "system" else messages
    return ({"role": "system", "content": system}, *own)
