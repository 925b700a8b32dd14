"""The rollout engine for any causal LM of transformers: our own decode loop on the policy itself.

A prompt is prefilled once, whatever the number of its completions. The loop knows tokens, masks and random streams; a
*decoder* knows the model: where keys and values live, and how a step is run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.decoder_layers import plain_outputs, uncompiled
from gopo_lightning.distributed.gathering import any_rank, compute_device, forward_is_collective
from gopo_lightning.policy.model import evaluating
from gopo_lightning.policy.positions import check_length
from gopo_lightning.rollout.engines.base import (
    OnGroup,
    RolloutEngine,
    SamplingConfig,
    SamplingDtype,
    check_drawn,
    check_dtype,
    ended,
    padding_token,
    sampling_dtype,
)
from gopo_lightning.rollout.engines.decoder_choice import DecoderChoice
from gopo_lightning.rollout.engines.decoders import Decoder
from gopo_lightning.rollout.engines.drawing import draw_tokens
from gopo_lightning.rollout.engines.precision import sampling_precision
from gopo_lightning.rollout.engines.streams import uniforms
from gopo_lightning.types import Completions, PromptBatch

_COMPACT_BELOW = 0.875
"""Rows are dropped when this share of them or less remains."""


class TransformersEngine(RolloutEngine):
    """Samples with the policy's own transformers forward, on the device where the policy is.

    Args:
        prefix_sharing: ``always`` keeps the prompt's keys and values once per prompt and ``never`` copies them for each
            completion. ``auto`` shares where a trial on the first call gives the model's own numbers. Where a model
            can do neither, prompts of one length are sampled together, or without a cache; a warning says why.
        dtype: precision of sampling. ``auto`` is that of the autocast around it (the Trainer's ``precision``), or else
            that of the weights. Linear weights of another type are copied once per rollout.
        max_rows: most completions decoded at once on a device, which bounds the memory of their keys and values; whole
            groups, so at least one. None decodes the whole batch together, which is fastest where it fits.
    """

    def __init__(
        self,
        prefix_sharing: Literal["auto", "always", "never"] = "auto",
        dtype: SamplingDtype = "auto",
        max_rows: int | None = None,
    ) -> None:
        if prefix_sharing not in ("auto", "always", "never"):
            raise ValueError(f"prefix_sharing is {prefix_sharing!r}, but it must be auto, always or never.")
        check_dtype(dtype)
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, but it must be >= 1; leave it out for no limit.")
        self.prefix_sharing, self.dtype, self.max_rows = prefix_sharing, dtype, max_rows
        self._choose = DecoderChoice(prefix_sharing)
        self.on_group: OnGroup | None = None

    def state_dict(self) -> dict[str, Any]:
        """How the policy is sampled, as a trial has found: a resumed run goes on in the same way."""
        return {"decoders": self._choose.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self._choose.load_state_dict(state["decoders"])

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """See :class:`RolloutEngine`."""
        device, together = compute_device(model), forward_is_collective(model)
        check_length(model, prompts.tokens_PL.shape[1], sampling.max_new_tokens, "the longest prompt of a batch")
        prompts = prompts.to(device)
        writer = CompletionWriter(tokenizer, sampling, seeds_N, eos_token_ids, len(prompts), device, self.on_group)
        with evaluating(model), uncompiled(), plain_outputs(model):
            decoder_type = self._choose(model, prompts)
            passes = self._passes(prompts, num_completions, decoder_type.equal_lengths, together)
            with sampling_precision(model, sampling_dtype(self.dtype, model)):
                for index_P in passes:
                    writer.begin(index_P)
                    decoder = decoder_type(model, prompts.select(index_P), num_completions, sampling.max_new_tokens)
                    with decoder.attention():
                        _decode(decoder, writer, num_completions, device if together else None)
        check_drawn(writer.logprobs_NT, prompts)  # at the end, where ranks that decode together have all done so
        return writer.completions()

    def _passes(
        self, prompts: PromptBatch, num_completions: int, equal_lengths: bool, together: bool
    ) -> Sequence[Tensor]:
        """Prompts to decode at a time. Ranks that go ``together`` make equally many passes."""
        at_once = len(prompts) if self.max_rows is None else max(self.max_rows // num_completions, 1)
        lengths_P = prompts.mask_PL.sum(-1).cpu() if equal_lengths else torch.zeros(len(prompts), dtype=torch.int64)
        alike = [(lengths_P == length).nonzero()[:, 0] for length in lengths_P.unique()]
        passes = [index_P for all_P in alike for index_P in all_P.tensor_split(-(-len(all_P) // at_once))]
        if together:  # a pass that is made again finds its completions written
            passes += passes[-1:] * (max(gather_objects(len(passes))) - len(passes))
        return passes


def _decode(
    decoder: Decoder, writer: "CompletionWriter", num_completions: int, together_on: torch.device | None
) -> None:
    """One pass, to the end of its completions; if forwards are collectives on a device, of those of all ranks."""
    logits_AV = decoder.prefill().repeat_interleave(num_completions, 0)
    while (tokens_A := writer.write(logits_AV)) is not None:
        if together_on:
            any_rank(True, together_on)
        if (kept := writer.compact()) is not None:
            decoder.keep(*kept)
            tokens_A = tokens_A[kept[1]]
        logits_AV = decoder.step(tokens_A)
    while together_on and any_rank(False, together_on):  # others have still to write
        decoder.step(logits_AV.argmax(-1))


class CompletionWriter:
    """The completions as they grow: N rows, of which A (the rectangle ``rows_PG``) are being decoded."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        seeds_N: Sequence[int],
        eos_token_ids: Sequence[int],
        num_prompts: int,
        device: torch.device,
        on_group: OnGroup | None = None,
    ) -> None:
        N, T = len(seeds_N), sampling.max_new_tokens
        self.tokenizer, self.sampling = tokenizer, sampling
        self.eos = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.int64, device=device)
        self.tokens_NT = torch.full((N, T), padding_token(tokenizer, eos_token_ids), device=device)
        self.mask_NT = torch.zeros(N, T, dtype=torch.bool, device=device)
        self.logprobs_NT = torch.zeros(N, T, device=device)
        self.finished_N = torch.zeros(N, dtype=torch.bool, device=device)
        self.uniforms_NT = uniforms(seeds_N, T, device)
        self.all_rows_PG = torch.arange(N, device=device).view(num_prompts, -1)
        self.on_group, self.told_P = on_group, torch.zeros(num_prompts, dtype=torch.bool)

    def begin(self, index_P: Tensor) -> None:
        """Write the completions of these prompts next, from their first token."""
        self.rows_PG, self.length = self.all_rows_PG[index_P.to(self.all_rows_PG.device)], 0

    def write(self, logits_AV: Tensor) -> Tensor | None:
        """Draw and record one token a row; None when all have ended."""
        t, rows_A = self.length, self.rows_PG.flatten()
        early = t < self.sampling.min_new_tokens
        tokens_A, logprobs_A = draw_tokens(
            logits_AV, self.uniforms_NT[rows_A, t], self.sampling, banned=self.eos if early else None
        )
        live_A = ~self.finished_N[rows_A]
        rows = rows_A[live_A]
        self.tokens_NT[rows, t] = tokens_A[live_A]
        self.logprobs_NT[rows, t] = logprobs_A[live_A]
        self.mask_NT[rows, t] = True
        self.length = t + 1
        # a row that is no distribution goes no further; whoever called is told by its log-prob
        self.finished_N[rows] = torch.isin(tokens_A[live_A], self.eos) | ~logprobs_A[live_A].isfinite()
        if self.sampling.stop_strings and self.length > self.sampling.min_new_tokens:
            self._match_stop_strings()
        if self.on_group is not None:
            self._tell(self.on_group)
        done = self.length == self.sampling.max_new_tokens or bool(self.finished_N[self.rows_PG].all())
        return None if done else tokens_A

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """Indices of the prompts and rows to go on with, when enough have ended to pay for the copy."""
        live_PG = ~self.finished_N[self.rows_PG]
        prompts_P = live_PG.any(-1).nonzero()[:, 0]
        width = int(live_PG.sum(-1).max())
        if len(prompts_P) * width > _COMPACT_BELOW * self.rows_PG.numel():
            return None
        # live rows first; a prompt with fewer of them is filled up with ended ones, which nobody reads
        columns_PG = live_PG.int().argsort(dim=-1, descending=True, stable=True)[prompts_P, :width]
        rows_A = (prompts_P[:, None] * live_PG.shape[1] + columns_PG).flatten()
        self.rows_PG = self.rows_PG.flatten()[rows_A].view(-1, width)
        return prompts_P, rows_A

    def completions(self) -> Completions:
        """What was written, without the columns that nobody reached."""
        width = int(self.mask_NT.sum(-1).max())
        tokens_NT, mask_NT = self.tokens_NT[:, :width].contiguous(), self.mask_NT[:, :width].contiguous()
        rows = [row[kept].tolist() for row, kept in zip(tokens_NT.cpu(), mask_NT.cpu(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return Completions(tokens_NT, mask_NT, ~self.finished_N, tuple(texts), self.logprobs_NT[:, :width].contiguous())

    def _tell(self, on_group: OnGroup) -> None:
        """Of the groups that have ended since the last time."""
        ended_P = (self.finished_N | self.mask_NT[:, -1])[self.all_rows_PG].all(-1).cpu()
        for p in (ended_P & ~self.told_P).nonzero()[:, 0].tolist():
            rows = self.all_rows_PG[p]
            tokens = [row[kept].tolist() for row, kept in zip(self.tokens_NT[rows], self.mask_NT[rows], strict=True)]
            on_group(p, ended(self.tokenizer, tokens, (~self.finished_N[rows]).tolist()))
        self.told_P |= ended_P

    def _match_stop_strings(self) -> None:
        """Mark the live rows whose text now holds a stop string that was not yet complete at ``min_new_tokens``.

        Only their last tokens are decoded.
        """
        stops, minimum = self.sampling.stop_strings, self.sampling.min_new_tokens
        window = max(len(stop.encode()) for stop in stops) + 8  # a token is a byte or more, a special one none
        rows_A = self.rows_PG.flatten()
        live_N = rows_A[~self.finished_N[rows_A]]
        start = max(0, self.length - window)
        before, texts = (
            self.tokenizer.batch_decode(self.tokens_NT[live_N, start:end].tolist(), skip_special_tokens=True)
            for end in (max(start, minimum), self.length)
        )
        hits = [_completes(old, new, stops) for old, new in zip(before, texts, strict=True)]
        self.finished_N[live_N] = torch.tensor(hits, dtype=torch.bool, device=live_N.device)  # there may be none


def _completes(before: str, text: str, stops: Sequence[str]) -> bool:
    """Whether ``text`` holds a stop string that reaches beyond what it shares with ``before``.

    >>> _completes("x#", "x# y", ["#"]), _completes("x#", "x# #", ["#"])
    (False, True)
    """
    shared = next(
        (n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text))
    )
    return any(text.find(stop, max(0, shared - len(stop) + 1)) >= 0 for stop in stops)
