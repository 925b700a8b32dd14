"""Which decoder a model takes: each is tried on the model itself, on a few tokens, against forwards without a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.gathering import forward_is_collective
from gopo_lightning.policy.shared_prefix import supports_shared_prefix
from gopo_lightning.rollout.engines.decoders import (
    DecoderType,
    ExpandedDecoder,
    RecomputingDecoder,
    SharedDecoder,
    UnpaddedDecoder,
)
from gopo_lightning.types import Prompt, PromptBatch

_LADDER: dict[DecoderType, str] = {
    SharedDecoder: "",
    ExpandedDecoder: "each completion gets its own copy of what the model remembers of the prompt",
    UnpaddedDecoder: "only prompts of one length are sampled together, each completion with its own copy of what the "
    "model remembers of the prompt",
    RecomputingDecoder: "sampling has no cache and forwards whole sequences for every token, which is slow",
}
"""From the fastest to the one that any causal LM takes, each with what it costs."""

_LENGTHS = (2, 5)
"""Prompt tokens of the trial: one row is padded by more than a short convolution sees."""


class DecoderChoice:
    """The first decoder of the ladder whose trial succeeds; a trial is made once for each model.

    Args:
        prefix_sharing: see ``TransformersEngine``.
    """

    def __init__(self, prefix_sharing: Literal["auto", "always", "never"]) -> None:
        self.prefix_sharing = prefix_sharing
        self._restored: dict[str, str] = {}
        self._latest: dict[DecoderType, str | None] = {}
        self._said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, prompts: PromptBatch) -> DecoderType:
        """The decoder for these prompts; all ranks decide alike where a forward is a collective.

        Raises:
            ValueError: ``always``, and the model cannot share; or no decoder gives the model's own numbers.
        """
        name = type(model).__name__.removeprefix("FSDP")
        self._latest = _trials.setdefault(model, {k: self._restored[k.__name__] or None for k in self._known()})
        ladder = list(_LADDER)[int(self.prefix_sharing == "never") :]
        reasons: list[str] = []
        for kind in ladder:
            reason = None
            if kind is SharedDecoder:
                _, reason = supports_shared_prefix(model)
            if not (reason := reason or _tried(kind, model, prompts)):
                self._say(model, kind, reasons)
                return kind
            if self.prefix_sharing == "always":
                raise ValueError(f"prefix_sharing is always, but {name} cannot: {reason}. Use auto or never.")
            reasons.append(reason)
        raise ValueError(f"{name} cannot be sampled from token by token: {'; '.join(reasons)}.")

    def state_dict(self) -> dict[str, str]:
        """What came of the trials, by the decoder's name: empty, or why it does not serve.

        A trial on trained weights may end otherwise; a resumed run would sample in another way, with other rounding.
        """
        return {kind.__name__: reason or "" for kind, reason in self._latest.items()} or dict(self._restored)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """What ``state_dict`` gave stands for trials on models that were not tried here."""
        self._restored = dict(state)

    def _known(self) -> list[DecoderType]:
        return [kind for kind in _LADDER if kind.__name__ in self._restored]

    def _say(self, model: nn.Module, kind: DecoderType, reasons: Sequence[str]) -> None:
        said = self._said.setdefault(model, set())
        if reasons and (text := f"{_LADDER[kind]}: {'; '.join(reasons)}") not in said:
            said.add(text)
            rank_zero_warn(text)


_trials: "WeakKeyDictionary[nn.Module, dict[DecoderType, str | None]]" = WeakKeyDictionary()


def _tried(kind: DecoderType, model: nn.Module, prompts: PromptBatch) -> str | None:
    """``obstacle``, once for each model."""
    trials = _trials.setdefault(model, {})
    if kind not in trials:
        trials[kind] = obstacle(kind, model, prompts)
    return trials[kind]


@dataclass(frozen=True)
class Trial:
    """Two prompts of different lengths, two completions of each, and the model's own logits along them."""

    prompts: PromptBatch
    tokens_NT: Tensor
    """int64 [4, 3]: three tokens of each completion."""
    logits_N: tuple[Tensor, ...]
    """[4, V] of each completion: before its first token and after each."""

    @classmethod
    def of(cls, model: nn.Module, prompts: PromptBatch) -> "Trial":
        """With tokens that are the same on every rank, and forwards of unpadded rows without a cache."""
        vocabulary = model(input_ids=prompts.tokens_PL[:1, -1:], use_cache=False).logits.shape[-1]
        tokens = (vocabulary // 4 + torch.arange(20) * max(vocabulary // 80, 1)) % vocabulary  # words, where there are
        rows = [tuple(tokens[8:][:length].tolist()) for length in _LENGTHS]
        tokens_NT = tokens[:12].view(4, 3)
        few = PromptBatch.collate([Prompt(p, row, "") for p, row in enumerate(rows)], int(tokens[0]))
        device = prompts.tokens_PL.device
        few, tokens_NT = few.to(device), tokens_NT.to(device)
        logits: list[Tensor] = []
        for p, row in enumerate(rows):
            both = tokens_NT[2 * p : 2 * p + 2]
            prompt = torch.tensor([row, row], device=device)
            output = model(input_ids=torch.cat([prompt, both], 1), use_cache=False)
            logits += output.logits[:, len(row) - 1 :].unbind()
        return cls(few, tokens_NT, tuple(logits))

    def run(self, kind: DecoderType, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits by this decoder, and what they should be: a completion of each prompt is dropped on the way."""
        found, expected = [], []
        passes = [[0], [1]] if kind.equal_lengths else [[0, 1]]
        for index in passes:
            few = self.prompts.select(torch.tensor(index))
            kept = torch.arange(1, 2 * len(index), 2, device=self.tokens_NT.device)
            rows = torch.tensor([2 * p + g for p in index for g in range(2)], device=self.tokens_NT.device)
            decoder = kind(model, few, 2, 3)
            with decoder.attention():
                found.append(decoder.prefill().repeat_interleave(2, 0))
                found.append(decoder.step(self.tokens_NT[rows, 0]))
                decoder.keep(torch.arange(len(index), device=rows.device), kept)
                found += [decoder.step(self.tokens_NT[rows[kept], t]) for t in (1, 2)]
            at = [(rows, 0), (rows, 1), (rows[kept], 2), (rows[kept], 3)]
            expected += [torch.stack([self.logits_N[n][t] for n in chosen.tolist()]) for chosen, t in at]
        return torch.cat(found).float(), torch.cat(expected).float()


@torch.no_grad()
def obstacle(kind: DecoderType, model: nn.Module, prompts: PromptBatch) -> str | None:
    """Why this decoder does not serve the model, by a trial; None if it does.

    Outside autocast: in bfloat16 two right decoders are up to 0.2 apart (a prompt of one repeated token), which is what
    a wrong one might be.
    """
    with torch.autocast(prompts.tokens_PL.device.type, enabled=False):
        trial = Trial.of(model, prompts)
        try:
            found, expected = trial.run(kind, model)
        except Exception as error:  # noqa: BLE001 - whatever a foreign model does not take is a reason to do it another way
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
            centred = expected - expected.mean(-1, keepdim=True)
            near = bool((found - expected).norm() <= (1e-3 if wide else 0.3) * centred.norm())
            near = near or not bool(expected.isfinite().all())  # a broken model is no decoder's fault
            reason = "" if near else _DIFFERENCE.get(kind, "its logits differ from those without a cache")
    if forward_is_collective(model):
        reason = max(gather_objects(reason))  # ranks must decide alike
    return reason or None


_DIFFERENCE: dict[DecoderType, str] = {
    SharedDecoder: "its logits differ from those without sharing",
    ExpandedDecoder: "its logits differ where prompts are padded on the left",
}
