"""A reward model: any Hugging Face sequence classifier, with its own tokenizer and chat template."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import plain_outputs
from gopo_lightning.distributed.fsdp import is_sharded
from gopo_lightning.distributed.gathering import compute_device, in_step
from gopo_lightning.objectives.named import check_choice
from gopo_lightning.policy.positions import max_length_of
from gopo_lightning.policy.prefix_sharing import PrefixSharing
from gopo_lightning.rewards.base import RewardSource, SourceConfigError
from gopo_lightning.rewards.calibration import read_tau
from gopo_lightning.rewards.loading import (
    Dtype,
    Truncation,
    encode,
    equal_rows,
    load_classifier,
    load_tokenizer,
    pad,
    place,
    select,
    set_pad_token,
)
from gopo_lightning.rewards.padding import float32_head, may_pad
from gopo_lightning.rewards.scored_texts import ScoredTemplate, scored_texts
from gopo_lightning.rewards.shared_scoring import Scorer, shared_scores
from gopo_lightning.types import Prompt

OutputField: TypeAlias = Literal["logits", "score"]
ScoreGroups: TypeAlias = Callable[[BatchEncoding, Sequence[int]], Tensor]
"""The tokens of some texts and the sizes of their groups → float32 scores."""

_STAND_IN = "."
"""Forwarded for a text without tokens, since a rank forwards as often as the others; its score is not read."""


class SequenceClassifierReward(RewardSource):
    """Scores completions with a frozen sequence classifier from Hugging Face.

    The model gets its own tokens: prompt and completion are rendered as text with its own chat template, and
    tokenized with its own tokenizer. Scores are float32. Where the model allows it, the tokens with which the texts
    of a prompt begin are forwarded once; else completions are sorted by length, so that a micro-batch has little
    padding.

    Args:
        model: hub name, local folder, or `packaged:NAME`.
        revision: branch, tag or commit on the hub.
        tokenizer: hub name or folder of the tokenizer; the model's own when null.
        dtype: of the weights. The head computes in float32 in any case: bfloat16 scores would make false
            ties.
        micro_batch_size: completions in one forward pass.
        max_length: most tokens of prompt and completion; the model's own limit when null.
        truncation: what happens above max_length. `error` stops the run, `left` drops the first tokens (keeps
            the completion), `right` the last.
        output_field: `logits` (a model with one label), or `score` for models whose output carries a field of
            that name.
        template: `chat` renders prompt and completion with the chat template, `plain` joins their texts (a
            plain prompt directly, the messages of a conversation by newlines), `pair` gives the tokenizer prompt
            and completion as two texts, for encoders trained on such, and `auto` is `chat` where the tokenizer has a
            template, else `plain`.
        include_prompt: false scores the completion's text alone, without a template.
        prefix_sharing: forward what the texts of a prompt begin with once: `auto` where a check on the first texts
            finds the same scores, `always` or an error, `never`. Sharded models never do.
        trust_remote_code: run Python code that comes with the model. Only for sources you trust.
        name: in logs and error messages.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "float32",
        micro_batch_size: int = 32,
        max_length: int | None = None,
        truncation: Truncation = "error",
        output_field: OutputField = "logits",
        template: ScoredTemplate = "auto",
        include_prompt: bool = True,
        prefix_sharing: PrefixSharing = "auto",
        trust_remote_code: bool = False,
        name: str = "reward_model",
    ) -> None:
        check_choice("dtype", dtype, get_args(Dtype))
        check_choice("truncation", truncation, get_args(Truncation))
        check_choice("output_field", output_field, get_args(OutputField))
        check_choice("template", template, get_args(ScoredTemplate))
        check_choice("prefix_sharing", prefix_sharing, get_args(PrefixSharing))
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size}: at least one completion goes in a pass. Use 32.")
        if template == "chat" and not include_prompt:
            raise ValueError(
                "template='chat' with include_prompt=False: a completion alone has no chat. Set template: plain."
            )
        if prefix_sharing == "always" and micro_batch_size == 1:
            raise ValueError(
                "prefix_sharing='always' with micro_batch_size=1: one completion in a pass shares nothing. "
                "Raise micro_batch_size, or leave prefix_sharing out."
            )
        if prefix_sharing == "always" and output_field == "score":
            raise ValueError(
                "prefix_sharing='always' with output_field='score': only logits are read from a shared row. Leave "
                "prefix_sharing out."
            )
        self.model_name, self.revision, self.tokenizer_name, self.dtype = model, revision, tokenizer, dtype
        self.micro_batch_size, self.max_length, self.truncation = micro_batch_size, max_length, truncation
        self.output_field, self.template, self.include_prompt = output_field, template, include_prompt
        self.prefix_sharing: PrefixSharing = "never" if output_field == "score" else prefix_sharing
        self.trust_remote_code, self.name = trust_remote_code, name
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.scorer: Scorer | None = None
        self._may_pad: bool | None = None  # not known yet
        self._told = set[str]()

    def setup(self, device: torch.device) -> None:
        """Load model and tokenizer on the first call, and place the model on ``device``.

        Raises:
            SourceConfigError: more than one label under `output_field: logits`, no pad token for
                micro-batches, no chat template under `template: chat`.
        """
        if self.model is None:
            tokenizer = load_tokenizer(self.tokenizer_name or self.model_name, self.revision, self.trust_remote_code)
            model = load_classifier(self.model_name, self.revision, self.dtype, self.trust_remote_code)
            self._check(model, tokenizer)
            set_pad_token(model, tokenizer)
            float32_head(model)
            self.max_length = max_length_of(model, tokenizer, self.max_length, alone=self.micro_batch_size == 1)
            self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
            self.scorer = Scorer(tokenizer, self.prefix_sharing, trains=False)
        place(self.model, device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float32 scores [N], on the model's device; NaN where the text has no tokens.

        Texts of the same tokens are scored once: beside other rows their scores would differ in the last digits, and
        completions that tie would be ranked. Other texts can have the same tokens where the tokenizer ignores case or
        truncation cuts off what differs. No tokens has an empty completion under `include_prompt: false`, where the
        tokenizer adds no special tokens.

        Raises:
            ValueError: a text longer than max_length under `truncation: error`.
        """
        if self.model is None or self.tokenizer is None:
            raise RuntimeError(f"reward source '{self.name}' is not loaded; call setup(device) first")
        texts_N, special_tokens = self.render(prompts, completions)
        prompt_of = dict(zip(reversed(texts_N), (prompt.index for prompt in reversed(prompts)), strict=True))
        texts: list[str | tuple[str, str]] = list(dict.fromkeys(texts_N))
        tokenize = partial(encode, self.tokenizer, max_length=self.max_length, truncation=self.truncation)
        encoded = tokenize(texts, add_special_tokens=special_tokens, may_be_empty=True)
        empty = {text for text, ids in zip(texts, encoded["input_ids"], strict=True) if not ids}
        if empty:
            stand_in = _STAND_IN if isinstance(texts[0], str) else (_STAND_IN, _STAND_IN)
            encoded = tokenize([stand_in if t in empty else t for t in texts], add_special_tokens=special_tokens)
        same = equal_rows(encoded)
        self._tell_of_cuts(encoded, same)
        encoded = select(encoded, [row for row, *_ in same])
        scores = torch.empty(len(same), dtype=torch.float32, device=compute_device(self.model))
        batches, score = self._plan(encoded, [prompt_of[texts[row]] for row, *_ in same])
        for groups in in_step(batches, self.model, spare=[[0]]):
            rows = [n for group in groups for n in group]
            scores[rows] = score(select(encoded, rows), [len(group) for group in groups]).to(scores)
        number = {texts[row]: n for n, rows in enumerate(same) for row in rows}
        scores_N = scores[[number[text] for text in texts_N]]
        return scores_N.masked_fill(torch.tensor([t in empty for t in texts_N], device=scores_N.device), torch.nan)

    def _tell_of_cuts(self, encoded: BatchEncoding, same: Sequence[Sequence[int]]) -> None:
        """Warn once of texts that truncation makes equal."""
        if self.truncation == "error":
            return
        cut = sum(len(rows) for rows in same if len(rows) > 1 and len(encoded["input_ids"][rows[0]]) == self.max_length)
        if cut:
            self._tell_once(
                f"of {len(encoded['input_ids'])} different texts {cut} are the same as "
                f"another when they are cut to max_length={self.max_length} (truncation: {self.truncation}), and tie. "
                "Raise max_length, or choose the other side.",
                "cuts",
            )

    def _tell_once(self, text: str, about: str) -> None:
        if about not in self._told:
            self._told.add(about)
            rank_zero_warn(f"reward source '{self.name}': {text}")

    def _plan(self, encoded: BatchEncoding, prompt_of: Sequence[int]) -> tuple[list[list[list[int]]], ScoreGroups]:
        """Micro-batches of groups of row numbers, and what gives the scores of one.

        Texts of one prompt go together where they are forwarded as one, else those of about the same length.
        """
        assert self.model is not None and self.tokenizer is not None and self.scorer is not None
        size, rows_of = self.micro_batch_size, dict[int, list[int]]()
        for row, prompt in enumerate(prompt_of):
            rows_of.setdefault(prompt, []).append(row)
        groups = [rows[start : start + size] for rows in rows_of.values() for start in range(0, len(rows), size)]
        trial = [group[: max(size // 2, 2)] for group in groups if len(group) > 1][:2]
        few = select(encoded, [n for group in trial for n in group])
        if trial and self.scorer.may_share(self.model, few, [*map(len, trial)]):
            return _filled(groups, size), self._shared
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda n: lengths[n])
        if self._may_pad is None and size > 1 and len({*lengths}) > 1 and not is_sharded(self.model):
            self._may_pad = may_pad(self.model, self.tokenizer, encoded, lambda few: self._apart(few, []))
            if not self._may_pad:
                self._tell_once(
                    "a text has another score beside a longer one, so they are scored one by one", "padding"
                )
        size = 1 if self._may_pad is False else size
        return [[order[start : start + size]] for start in range(0, len(order), size)], self._apart

    def fitted_tau(self) -> float | None:
        """What reward-model training has left in `calibration.json` beside the weights."""
        return read_tau(self.model_name, self.revision)

    def models(self) -> list[nn.Module]:
        """The classifier."""
        return [] if self.model is None else [self.model]

    def render(
        self, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> tuple[Sequence[str | tuple[str, str]], bool]:
        """What the model reads, and whether the tokenizer still has to add special tokens."""
        if not self.include_prompt:
            return list(completions), True
        assert self.tokenizer is not None
        return scored_texts(self.tokenizer, self.template, prompts, completions)

    def _shared(self, encoded: BatchEncoding, group_sizes: Sequence[int]) -> Tensor:
        """float32 scores of one micro-batch, what the texts of a group begin with once."""
        assert self.model is not None and self.scorer is not None
        packed = self.scorer.packed(encoded, group_sizes).to(compute_device(self.model))
        with torch.autocast(packed.tokens_1S.device.type, enabled=False):
            return shared_scores(self.model, packed).float()

    def _apart(self, encoded: BatchEncoding, group_sizes: Sequence[int]) -> Tensor:
        """float32 scores of one micro-batch, each text in a row of its own."""
        assert self.model is not None and self.tokenizer is not None
        num_texts, device = len(encoded["input_ids"]), compute_device(self.model)
        inputs = pad(self.tokenizer, encoded, range(num_texts)).to(device)
        with torch.autocast(device.type, enabled=False), plain_outputs(self.model):
            output = self.model(**inputs)
        scores = getattr(output, self.output_field, None)
        if scores is None or scores.numel() != num_texts:
            got = "no such field" if scores is None else f"shape {tuple(scores.shape)}"
            raise SourceConfigError(
                f"reward source '{self.name}': output field '{self.output_field}' of {self.model_name} "
                f"should have one number for each of {num_texts} texts, got {got}. Set "
                "output_field to the one that has the score."
            )
        if scores.dtype != torch.float32:
            self._tell_once(
                f"{self.model_name} gives its scores in {str(scores.dtype).removeprefix('torch.')}, in which many tie "
                "that differ. Set dtype: float32.",
                "dtype",
            )
        return scores.reshape(-1).float()

    def _check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.output_field == "logits" and model.config.num_labels != 1:
            raise SourceConfigError(
                f"reward source '{self.name}': {self.model_name} has {model.config.num_labels} labels, a "
                "reward is one number. Use a model with num_labels=1, set output_field: score if its output "
                "has that field, or wrap it in a FunctionReward that picks a label."
            )
        if self.template == "chat" and not tokenizer.chat_template:
            raise SourceConfigError(
                f"reward source '{self.name}': template='chat', but its tokenizer has no chat template. Set "
                "template: plain, or tokenizer: a name or folder of one that has a template."
            )
        if tokenizer.pad_token_id is None and self.micro_batch_size > 1:
            raise SourceConfigError(
                f"reward source '{self.name}': its tokenizer has no pad token, which micro-batches of "
                f"{self.micro_batch_size} need. Set micro_batch_size: 1, or tokenizer: a name or folder of "
                "one with a pad token."
            )


def _filled(groups: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Groups in their order, as many together as have at most ``size`` texts.

    >>> _filled([[0, 1], [2, 3], [4]], 3)
    [[[0, 1]], [[2, 3], [4]]]
    """
    batches: list[list[list[int]]] = []
    for group in groups:
        if batches and sum(map(len, batches[-1])) + len(group) <= size:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches
