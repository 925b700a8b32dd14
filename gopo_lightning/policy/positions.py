"""How long a sequence a model takes: tables of positions that end, and rotary frequencies that change with length."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import base_of

_UNLIMITED = 1_000_000
"""Tokenizers without a limit give a model_max_length far above this."""


def check_length(model: nn.Module, prompt_tokens: int, max_new_tokens: int, where: str) -> None:
    """Whether ``model`` takes a prompt of so many tokens, which stands at ``where``, and its completion.

    Raises:
        ValueError: it has too few positions, or its log-probs would depend on the other rows of a batch.
    """
    total = prompt_tokens + max_new_tokens
    name, limit, steady = type(base_of(model)).__name__, position_limit(model), steady_length(model)
    if limit is not None and total > limit:
        reason = f"{name} has positions for {limit}"
    elif steady is not None and total > steady[0]:
        limit = steady[0]
        reason = (
            f"beyond {limit} the rotary frequencies of {name} (rope_type: {steady[1]}) are those of the longest row in "
            "a batch, so log-probs would depend on the other rows"
        )
    else:
        return
    remedy = "Lower model.init_args.rollout.sampling.max_new_tokens"
    if limit > max_new_tokens:
        fitting = limit - max_new_tokens
        remedy += f", or set data.init_args.max_prompt_tokens: {fitting} and overlong: drop or truncate_left"
    raise ValueError(
        f"{where} has {prompt_tokens} tokens, with max_new_tokens={max_new_tokens} {total}, but {reason}. {remedy}."
    )


def max_length_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int | None = None, *, alone: bool = False
) -> int | None:
    """The most tokens of a text: ``wanted``, or what both model and tokenizer take; None where neither has a limit.

    Args:
        model: that reads the texts.
        tokenizer: its own.
        wanted: as configured.
        alone: each text has a forward of its own, so none depends on another's length.

    Raises:
        ValueError: ``wanted`` is more than the model has positions for, or than it reads the same beside others.
    """
    steady = None if alone else steady_length(model)
    if wanted is not None and steady is not None and wanted > steady[0]:
        raise ValueError(
            f"max_length={wanted}, but beyond {steady[0]} tokens the rotary frequencies of {type(model).__name__} "
            f"(rope_type: {steady[1]}) are those of the longest text in a forward, so a score would depend on the "
            f"other texts. Lower max_length to {steady[0]}, or set micro_batch_size: 1."
        )
    positions = position_limit(model)
    if wanted is not None and positions is not None and wanted > positions:
        raise ValueError(
            f"max_length={wanted}, but {type(model).__name__} has positions for {positions} tokens. Lower it, or leave "
            "it out."
        )
    usual = usual_length(model) if positions is None else positions
    given = tokenizer.model_max_length, usual, steady and steady[0]
    limits = [n for n in given if n is not None and 0 < n < _UNLIMITED]
    return wanted or min(limits, default=None)


def position_limit(model: nn.Module) -> int | None:
    """The most tokens of a sequence for which ``model`` has positions; None where its positions have no end.

    Learned positions and stored ones end with their table. A table whose positions begin after a padding id (RoBERTa)
    or at an offset (OPT) holds fewer tokens than rows.
    """
    rows = [
        module.num_embeddings - _first_position(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and any(map(_is_of_positions, name.split(".")))  # adapters wrap it
    ]
    rows += [
        len(buffer)
        for name, buffer in model.named_buffers()
        if _is_of_positions(name.rpartition(".")[2]) and buffer.is_floating_point() and buffer.ndim == 2
    ]
    config = _config(model)
    if not rows and not getattr(config, "rope_parameters", None):
        rows = [n for n in [getattr(config, "max_seq_len", None)] if n is not None]  # MPT stores biases by distance
    return min(rows, default=None)


def _is_of_positions(name: str) -> bool:
    return name == "wpe" or ("pos" in name and "rel" not in name)


def _first_position(table: nn.Embedding) -> int:
    padding = table.padding_idx
    return int(getattr(table, "offset", 0)) + (0 if padding is None else padding + 1)


def steady_length(model: nn.Module) -> tuple[int, str] | None:
    """``(tokens, rope type)`` beyond which a row's numbers depend on the longest row of its batch; None if never.

    transformers takes the frequencies of `dynamic` and `longrope` from the longest row of a forward, above the length
    that the model was first trained for.
    """
    config = _config(model)
    given = getattr(config, "rope_parameters", None) or {}
    by_layer = [rope for rope in given.values() if isinstance(rope, dict)] if isinstance(given, dict) else []
    found = []
    for rope in by_layer or [given]:
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope" or "dynamic" in kind:
            trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append((int(trained), kind))
    return min(found, default=None)


def usual_length(model: nn.Module) -> int | None:
    """The longest sequences that ``model`` was made for, by its configuration."""
    return getattr(_config(model), "max_position_embeddings", None)


def _config(model: nn.Module) -> Any:
    config: Any = getattr(base_of(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None
