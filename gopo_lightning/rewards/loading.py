"""Hugging Face sequence classifiers: loading and tokenizing, for scoring and for reward-model training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gopo_lightning.data.conversations import apply_template, check_unicode
from gopo_lightning.policy.adapters import (
    TaskType,
    base_of_adapter,
    check_saved,
    head_of_adapter,
    load_adapter,
    saved_adapter,
)
from gopo_lightning.policy.loading import finding, load_weights, locate
from gopo_lightning.policy.sharded_loading import model_without_weights

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "auto"]
Truncation: TypeAlias = Literal["error", "left", "right"]

Empty: TypeAlias = dict[nn.Module, tuple[str, str | None]]
"""Models without weights → name and revision of what has them."""

_CHECKED_AT_ONCE = 1000
"""Texts; enough that tokenizing them one by one costs nothing."""


_EMPTY: ContextVar["Empty | None"] = ContextVar("_EMPTY", default=None)


@contextmanager
def without_weights() -> Iterator[Empty]:
    """Inside, models get no weights: they are to be sharded first and then filled."""
    made: Empty = {}
    token = _EMPTY.set(made)
    try:
        yield made
    finally:
        _EMPTY.reset(token)


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move ``model`` to ``device``; one without weights waits for them where it is."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(device)  # type: ignore[arg-type]


def load_classifier(
    name: str, revision: str | None, dtype: Dtype, trust_remote_code: bool, **config: Any
) -> PreTrainedModel:
    """The sequence classifier ``name`` (hub, folder or `packaged:NAME`); ``config`` overrides its config.

    An adapter is merged into its base, as in `load_causal_lm`.
    """
    return _load(AutoModelForSequenceClassification, "SEQ_CLS", name, revision, dtype, trust_remote_code, config)


def load_causal_lm(name: str, revision: str | None, dtype: Dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The causal LM ``name`` (hub, folder or `packaged:NAME`); an adapter is merged, in float32, into its base."""
    return _load(AutoModelForCausalLM, "CAUSAL_LM", name, revision, dtype, trust_remote_code, {})


def _load(
    auto_class: Any,
    task_type: TaskType,
    name: str,
    revision: str | None,
    dtype: Dtype,
    trust_remote_code: bool,
    config: dict[str, Any],
) -> PreTrainedModel:
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    adapter, loaded = saved_adapter(name, revision), wanted
    if adapter is not None:
        check_saved(adapter, task_type)
        name, revision = base_of_adapter(adapter)
        loaded = wanted if dtype == "auto" else torch.float32
        if task_type == "SEQ_CLS":
            config = {"num_labels": head_of_adapter(adapter)} | config
    if (made := _EMPTY.get()) is not None and adapter is None and not config:
        with finding(name, revision):
            dtype_or_own = None if dtype == "auto" else wanted
            empty = model_without_weights(auto_class, name, revision, dtype_or_own, trust_remote_code=trust_remote_code)
        made[empty] = (name, revision)
        return empty
    with finding(name, revision):
        options = {"revision": revision, "dtype": loaded, "trust_remote_code": trust_remote_code}
        model: PreTrainedModel = load_weights(auto_class, locate(name), **options, **config)
    if adapter is not None:
        model = load_adapter(model, adapter, trained=False).merge_and_unload()
        model = model if dtype == "auto" else model.to(wanted)
    return model


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer ``name``. It pads on the right: classifiers count positions from the first column."""
    adapter = saved_adapter(name, revision)
    if adapter is not None and not (adapter / "tokenizer_config.json").exists():
        name, revision = base_of_adapter(adapter)
    with finding(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(locate(name), revision=revision, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "right"
    return tokenizer


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's pad id the tokenizer's: decoder classifiers read the score off the last token that is
    not it.
    """
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, str]],
    max_length: int | None,
    truncation: Truncation,
    add_special_tokens: bool = True,
    *,
    may_be_empty: bool = False,
) -> BatchEncoding:
    """Tokens of each text or pair of texts, unpadded, at most ``max_length``; special tokens survive truncation.

    Of a pair the first text loses tokens on the left, or the second on the right.

    Raises:
        ValueError: a text is longer under `truncation="error"`, or has no tokens at all and not ``may_be_empty``; a
            pair is too long even without the text that is cut.
    """
    cut: bool | str = truncation != "error" and max_length is not None
    if cut:
        tokenizer.truncation_side = truncation
    columns: list[list[str]] = [list(texts)]  # type: ignore[arg-type]
    if texts and not isinstance(texts[0], str):
        columns = [list(column) for column in zip(*texts, strict=True)]
        cut = cut and ("only_first" if truncation == "left" else "only_second")
    options: dict[str, Any] = {"truncation": cut, "max_length": max_length if cut else None, "verbose": False}
    try:
        encoded = tokenizer(*columns, add_special_tokens=add_special_tokens, **options)
    except Exception as error:  # of the Rust backend, which has no class of its own for it
        if len(columns) == 1 or "too short" not in str(error):
            raise
        raise ValueError(
            f"a pair of texts has more than max_length={max_length} tokens even without its "
            f"{'prompt' if truncation == 'left' else 'completion'}. Raise max_length, or choose the other side."
        ) from error
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"{len(ids)} tokens exceed max_length={max_length} in the text {text[:80]!r}…. Set "
                "truncation: left or right, a larger max_length if the model allows it, or drop long "
                "prompts."
            )
        if not ids and not may_be_empty:
            raise ValueError(f"the text {text!r} has no tokens, so there is nothing to score. Drop empty texts.")
    return encoded


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Sequence[Mapping[str, Any]]],
    max_length: int | None,
    truncation: Truncation,
) -> BatchEncoding:
    """Like `encode`, of texts and conversations.

    A conversation goes through the chat template, which brings its own special tokens; a tokenizer without one reads
    the contents joined by newlines. So `SequenceClassifierReward` renders it too.
    """
    rendered = [render(tokenizer, text) for text in texts]
    if len({is_chat for _, is_chat in rendered}) > 1:
        raise ValueError("a batch mixes texts and conversations, which are tokenized differently. Use one kind.")
    is_chat = any(is_chat for _, is_chat in rendered)
    return encode(tokenizer, [text for text, _ in rendered], max_length, truncation, add_special_tokens=not is_chat)


def render(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """The text that the model reads, and whether the chat template wrote it.

    Raises:
        ValueError: the template refuses the conversation, or the text is no valid Unicode.
    """
    is_chat = not isinstance(text, str) and bool(tokenizer.chat_template)
    if isinstance(text, str):
        rendered = text
    elif is_chat:
        rendered = apply_template(tokenizer, text)
    else:
        rendered = "\n".join(str(message["content"]) for message in text)
    check_unicode(rendered)
    return rendered, is_chat


def check_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[str, str | Sequence[Mapping[str, Any]]]],
    max_length: int | None,
    truncation: Truncation,
) -> None:
    """Render every text, and encode it where one may be too long: what `encode_texts` refuses is found at once.

    Args:
        tokenizer: of the model.
        texts: where each stands, and the text.
        max_length: see `encode`.
        truncation: see `encode`.

    Raises:
        ValueError: as `encode_texts`, with the place of the text.
    """
    first: dict[bool, str] = {}
    texts = iter(texts)
    while chunk := list(islice(texts, _CHECKED_AT_ONCE)):
        rendered = []
        for where, text in chunk:
            with _named(where):
                content, is_chat = render(tokenizer, text)
            rendered.append(content)
            first.setdefault(is_chat, where)
        if len(first) > 1:
            raise ValueError(
                f"{first[False]} is a plain text and {first[True]} a conversation; they are tokenized differently. Use "
                "one kind."
            )
        if truncation == "error":
            _check_lengths(tokenizer, [where for where, _ in chunk], rendered, max_length, not is_chat)


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, places: list[str], texts: list[str], max_length: int | None, special: bool
) -> None:
    try:
        encode(tokenizer, texts, max_length, "error", special)
    except ValueError:
        for where, text in zip(places, texts, strict=True):
            with _named(where):
                encode(tokenizer, [text], max_length, "error", special)
        raise


@contextmanager
def _named(where: str) -> Iterator[None]:
    """A ValueError inside says where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def select(encoded: BatchEncoding, rows: Sequence[int]) -> BatchEncoding:
    """The ``rows`` of ``encoded``."""
    return BatchEncoding({key: [values[n] for n in rows] for key, values in encoded.items()})


def equal_rows(encoded: BatchEncoding) -> list[list[int]]:
    """The numbers of the rows, those with the same tokens together."""
    rows_of: dict[Any, list[int]] = {}
    for row, tokens in enumerate(zip(*(map(tuple, column) for column in encoded.values()), strict=True)):
        rows_of.setdefault(tokens, []).append(row)
    return list(rows_of.values())


def pad(tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding, rows: Sequence[int]) -> BatchEncoding:
    """The ``rows`` of ``encoded`` as tensors, padded to the longest of them."""
    columns = select(encoded, rows)
    if len(rows) == 1:  # nothing to pad, and the tokenizer may have no pad token
        return BatchEncoding(columns.data, tensor_type="pt")
    return tokenizer.pad(columns, return_tensors="pt")
