"""The rollout engine for GPUs: vLLM inside the training process, with a copy of the policy's weights."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.distributed.whole_weights import merged_weights
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.rollout.engines.base import (
    RolloutEngine,
    SamplingConfig,
    SamplingDtype,
    check_drawn,
    check_dtype,
    padding_token,
    sampling_dtype,
)
from gopo_lightning.rollout.engines.vllm_start import (
    OWN,
    LogprobsMode,
    check_options,
    check_supported,
    logprob_temperature,
    logprobs_mode,
    start,
    undisturbed,
)
from gopo_lightning.types import Completions, PromptBatch

_TOLERANCE = 0.25
"""Nats: bfloat16 makes 0.02 to 0.05, weights that did not arrive several."""


class VLLMEngine(RolloutEngine):
    """Samples with vLLM on the device of the policy: one engine on each rank, which gets the weights at each rollout.

    A completion draws from a random stream of its own, as with the other engine, but in vLLM's way: another text, and
    as independent of strategy and rank up to rounding. vLLM rounds otherwise than the trainer: see
    ``train/sampler_logprob_diff`` and ``objective.loss.sampler_correction_cap``.

    Args:
        dtype: precision of vLLM's weights. ``auto`` is that of the Trainer's ``precision``, or else of the policy's.
        gpu_memory_utilization: share of the device's memory for vLLM, its cache of keys and values included (on CPUs
            of the main memory). Training needs the rest.
        max_model_len: most tokens of a prompt with its completion, for which the cache must have room; None for the
            model's own limit.
        sleep: give vLLM's memory back between rollouts. GPUs only.
        check_every_n_rollouts: how often the policy computes the log-probs of a completion too, which stops the run
            where vLLM's differ: weights may be lost on the way. It costs a forward of one completion.
        options: more arguments of ``vllm.LLM``: ``enforce_eager``, ``kv_cache_memory_bytes``, ``max_num_seqs``, …

    Raises:
        ValueError: vLLM is not installed; or ``options`` holds what the engine decides.
    """

    def __init__(
        self,
        dtype: SamplingDtype = "auto",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        sleep: bool = False,
        check_every_n_rollouts: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError("VLLMEngine needs vLLM: pip install 'gopo-lightning[vllm]'. Or use TransformersEngine.")
        check_dtype(dtype)
        if check_every_n_rollouts < 1:
            raise ValueError(
                f"check_every_n_rollouts={check_every_n_rollouts} must be at least 1; 1 checks each rollout"
            )
        fields = {"gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len}
        self.dtype, self.sleep, self.options = dtype, sleep, fields | (options or {})
        for name, value in (options or {}).items():
            if name in OWN or name in fields:
                where = "set the engine's own field" if name in fields else "the engine decides it; take it out"
                raise ValueError(f"{name}={value!r} among the options of VLLMEngine: {where}.")
        self.check_every_n_rollouts, self._rollouts = check_every_n_rollouts, 0
        self._llm: Any = None
        self._mode: LogprobsMode = "raw_logprobs"
        self._started_with: dict[str, Any] = {}

    def check_sampling(self, sampling: SamplingConfig, *, logprobs: bool) -> None:
        """See :class:`ChecksSampling`."""
        check_supported(sampling, logprobs=logprobs)
        check_options(self.options)

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
        """See :class:`RolloutEngine`.

        Raises:
            ValueError: a sequence may become longer than ``max_model_len``; vLLM does not start, or was started for
                another model, device or precision; or its log-probs are not those of ``model``.
        """
        device, dtype = compute_device(model), sampling_dtype(self.dtype, model)
        check_supported(sampling, logprobs=False)
        with torch.autocast(device.type, enabled=False), undisturbed():
            if self._llm is None:
                self._mode = logprobs_mode(sampling)
                self._llm = self._start(model, tokenizer, device, dtype)
                self._sleep()
            self._check_same(model, device, dtype)
            self._check_lengths(prompts, sampling)
            self._load(model, dtype)
            outputs = self._sample(prompts, num_completions, sampling, seeds_N, eos_token_ids)
            self._sleep()
        logprobs_NT = pad_sequence([_logprobs(output) for output in outputs], batch_first=True)
        check_drawn(logprobs_NT, prompts)
        reported_at = logprob_temperature(self._mode, sampling)
        own = reported_at == (sampling.temperature or 1.0)
        completions = _completions(outputs, tokenizer, padding_token(tokenizer, eos_token_ids))
        completions = replace(completions, sampler_logprobs_NT=logprobs_NT if own else None).to(device)
        if self._rollouts % self.check_every_n_rollouts == 0 and reported_at is not None:
            _check_logprobs(model, prompts, completions, logprobs_NT, reported_at)
        self._rollouts += 1
        return completions

    def _start(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
    ) -> Any:
        if self.sleep and device.type == "cpu":
            raise ValueError("sleep=True of VLLMEngine needs a GPU, but the policy is on CPUs; leave it out.")
        options = {**self.options, "enable_sleep_mode": True} if self.sleep else self.options
        return start(model, tokenizer, device, dtype, self._mode, options)

    def _check_same(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """What vLLM was started with cannot change; the temperature may, for log-probs are then given or not."""
        config: Any = base_of(model).config  # FSDP2 renames classes
        now = {"model": config.model_type, "device": str(device), "dtype": str(dtype)}
        self._started_with = self._started_with or now
        for name, value in now.items():
            if value != self._started_with[name]:
                raise ValueError(
                    f"VLLMEngine was started with {name} {self._started_with[name]} and is now asked for {value}, "
                    "which cannot change. Use an engine for each, in processes of their own; set the engine's dtype if "
                    "only the Trainer's precision differs."
                )

    def _check_lengths(self, prompts: PromptBatch, sampling: SamplingConfig) -> None:
        longest, limit = max(len(p.token_ids) for p in prompts.prompts), self._llm.model_config.max_model_len
        if longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens with max_new_tokens={sampling.max_new_tokens} may become longer than "
                f"the {limit} tokens of VLLMEngine; raise its max_model_len, or cut prompts or completions"
            )

    def _load(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Today's weights; what was computed with others is forgotten."""

        def load(worker: Any) -> None:
            # copies: vLLM keeps some until the end, when sharded weights are gone
            weights = ((name, value.to(dtype, copy=True)) for name, value in merged_weights(model))
            worker.reload_weights(weights_iterator=weights)

        if self.sleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc(load)
        if self.sleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleep:
            self._llm.sleep(level=2)  # nothing is kept: the weights come anew

    def _sample(
        self,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        seeds_N: Sequence[int],
        eos_token_ids: Sequence[int],
    ) -> list[Any]:
        """vLLM's completions, N of them; its cache computes a prompt once."""
        from vllm import SamplingParams, TokensPrompt

        rows = [p.token_ids for p in prompts.prompts for _ in range(num_completions)]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(row)) for row in rows],
            [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    min_p=sampling.min_p,
                    max_tokens=sampling.max_new_tokens,
                    min_tokens=sampling.min_new_tokens,
                    stop=list(sampling.stop_strings),
                    stop_token_ids=list(eos_token_ids),
                    ignore_eos=True,  # those above are all
                    detokenize=bool(sampling.stop_strings),
                    logprobs=0,  # of the drawn token alone
                    seed=seed,
                )
                for seed in seeds_N
            ],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]


def _completions(outputs: Sequence[Any], tokenizer: PreTrainedTokenizerBase, pad: int) -> Completions:
    rows = [torch.tensor(output.token_ids) for output in outputs]
    tokens_NT = pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths_N = torch.tensor([len(row) for row in rows])
    return Completions(
        tokens_NT,
        torch.arange(tokens_NT.shape[1]) < lengths_N[:, None],
        torch.tensor([output.finish_reason == "length" for output in outputs]),
        tuple(tokenizer.batch_decode([list(output.token_ids) for output in outputs], skip_special_tokens=True)),
    )


def _logprobs(output: Any) -> torch.Tensor:
    """Of the drawn tokens, float32 [T]."""
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in steps], dtype=torch.float32)


def _check_logprobs(
    model: nn.Module, prompts: PromptBatch, completions: Completions, theirs_NT: torch.Tensor, temperature: float
) -> None:
    """ValueError unless both give the longest completion the same log-probs: weights may be lost on the way."""
    n = completions.lengths_N.argmax()
    few, prompt = completions.select(n[None]), prompts.select(n[None] * len(prompts) // len(completions))
    ours_T = completion_logprobs(model, prompt, few, temperature=temperature).logprobs_NT[0].cpu()
    difference = float((ours_T - theirs_NT[int(n), : len(ours_T)]).abs().mean())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"vLLM's log-probs differ from those of {type(base_of(model)).__name__} by {difference:.2f} nats a token "
            f"(at most {_TOLERANCE}): it runs this model otherwise, or not all weights arrive under its names. Use "
            "TransformersEngine."
        )
