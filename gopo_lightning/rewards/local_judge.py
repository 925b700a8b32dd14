"""A judge on this machine: any causal LM of Hugging Face, asked for one letter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.data.conversations import without_end
from gopo_lightning.distributed.gathering import compute_device, in_step
from gopo_lightning.policy.next_token import next_token_logits
from gopo_lightning.policy.positions import max_length_of
from gopo_lightning.rewards.base import SourceConfigError
from gopo_lightning.rewards.judge_prompt import CRITERION, fenced
from gopo_lightning.rewards.loading import Dtype, load_causal_lm, load_tokenizer, place
from gopo_lightning.rewards.pairwise import PairComparator
from gopo_lightning.rewards.scored_texts import Template
from gopo_lightning.types import Prompt


class LocalJudge(PairComparator):
    """Compares pairs with a frozen causal LM that runs beside the policy.

    The model reads both completions and would now write a letter. P(first wins) = σ(logit of "A" − logit of "B").
    Nothing is generated, so a text that asks to be chosen cannot forge an answer, only sway the model.

    Args:
        model: hub name, local folder or `packaged:NAME` of a causal LM.
        criterion: the question, such as "Which response is friendlier?".
        name: in logs and error messages.
        num_opponents: others of its group that each completion meets, by a round-robin; all when null.
        both_orders: ask each pair in both orders and average: models prefer a position.
        seed: decides which of the two orders is asked otherwise.
        revision: branch, tag or commit on the hub.
        tokenizer: hub name or folder of the tokenizer; the model's own when null.
        dtype: of the weights. The two logits are compared in float32.
        micro_batch_size: pairs in one forward pass.
        max_length: most tokens of a question; the model's own limit when null. A longer one abstains.
        template: `chat` asks in a chat, `plain` as text, `auto` is `chat` where the tokenizer has a template.
        trust_remote_code: run Python code that comes with the model. Only for sources you trust.
    """

    def __init__(
        self,
        model: str,
        criterion: str = CRITERION,
        name: str = "judge",
        num_opponents: int | None = None,
        both_orders: bool = True,
        seed: int = 0,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "bfloat16",
        micro_batch_size: int = 8,
        max_length: int | None = None,
        template: Template = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(name, num_opponents, both_orders, seed)
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size}: at least one pair goes in a pass. Use 8.")
        self.tolerance = None
        self.model_name, self.criterion, self.revision, self.tokenizer_name = model, criterion, revision, tokenizer
        self.dtype, self.micro_batch_size, self.max_length = dtype, micro_batch_size, max_length
        self.template, self.trust_remote_code = template, trust_remote_code
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.labels: list[int] = []
        self._too_long = 0

    def setup(self, device: torch.device) -> None:
        """Load on the first call, and place the model on ``device``.

        Raises:
            SourceConfigError: no chat template under `template: chat`, or "A" and "B" are no single tokens.
        """
        if self.model is None:
            self.tokenizer = load_tokenizer(
                self.tokenizer_name or self.model_name, self.revision, self.trust_remote_code
            )
            self._check_tokenizer(self.tokenizer)
            model = load_causal_lm(self.model_name, self.revision, self.dtype, self.trust_remote_code)
            self.max_length = max_length_of(model, self.tokenizer, self.max_length, alone=self.micro_batch_size == 1)
            self.model = model.eval().requires_grad_(False)
        place(self.model, device)

    @torch.no_grad()
    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
        """float32 P(first wins); NaN for questions longer than max_length."""
        if self.model is None:
            raise RuntimeError(f"pairwise source '{self.name}' is not loaded; call setup(device) first")
        questions = [self.tokens(*pair) for pair in zip(prompts, firsts, seconds, strict=True)]
        fitting = [n for n, ids in enumerate(questions) if self.max_length is None or len(ids) <= self.max_length]
        self._too_long += len(questions) - len(fitting)
        fitting.sort(key=lambda n: len(questions[n]))
        answers = torch.full((len(questions),), torch.nan)
        size = self.micro_batch_size
        batches = [fitting[start : start + size] for start in range(0, len(fitting), size)]
        for rows in in_step(batches, self.model, spare=[]):
            probabilities = self._forward([questions[n] for n in rows] or [self.labels])
            answers[rows] = probabilities[: len(rows)].cpu()
        return answers

    def models(self) -> list[nn.Module]:
        """The judge."""
        return [] if self.model is None else [self.model]

    def counters(self) -> dict[str, int]:
        """Questions that were too long, so far."""
        return {"abstained": self._too_long}

    def tokens(self, prompt: Prompt, first: str, second: str) -> list[int]:
        """The question, up to where the letter comes."""
        assert self.tokenizer is not None
        text = f"{fenced(prompt, first, second)[0]}\n\n{self.criterion} Answer with one letter, A or B."
        if self.template == "plain" or not self.tokenizer.chat_template:
            text = f"{text}\nAnswer:\n"
            return without_end(self.tokenizer, self.tokenizer(text)["input_ids"], text)
        chat: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def _forward(self, questions: list[list[int]]) -> Tensor:
        """float32 P("A") among the two letters, of one micro-batch."""
        assert self.model is not None
        device = compute_device(self.model)
        rows = [torch.tensor(ids, device=device) for ids in questions]
        lengths_N = torch.tensor([len(row) for row in rows], device=device)
        tokens_NS = pad_sequence(rows, batch_first=True, padding_value=self.labels[0])
        with torch.autocast(device.type, enabled=False):
            logits_NV = next_token_logits(self.model, tokens_NS, lengths_N)
        logits = logits_NV[:, self.labels].float()
        return (logits[:, 0] - logits[:, 1]).sigmoid()

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.template == "chat" and not tokenizer.chat_template:
            raise SourceConfigError(
                f"pairwise source '{self.name}': template='chat', but its tokenizer has no chat template. Set "
                "template: plain, or tokenizer: a name or folder of one that has a template."
            )
        letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
        if any(len(ids) != 1 for ids in letters):
            raise SourceConfigError(
                f"pairwise source '{self.name}': 'A' and 'B' must be one token each for {self.model_name}, got "
                f"{letters}. Use another model."
            )
        self.labels = [ids[0] for ids in letters]
