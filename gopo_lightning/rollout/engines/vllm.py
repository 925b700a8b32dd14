"""The rollout engine for GPUs: vLLM inside the training process, with a copy of the policy's weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.distributed.gathering import compute_device
from gopo_lightning.distributed.whole_weights import merged_weights
from gopo_lightning.rollout.engines import vllm_adapter
from gopo_lightning.rollout.engines.base import (
    RolloutEngine,
    SamplingConfig,
    SamplingDtype,
    check_dtype,
    sampling_dtype,
)
from gopo_lightning.rollout.engines.vllm_results import Sampled, check_logprobs, sampling_parameters, to_completions
from gopo_lightning.rollout.engines.vllm_start import (
    OWN,
    LogprobsMode,
    check_installed,
    check_lengths,
    check_options,
    check_supported,
    logprobs_mode,
    start,
    undisturbed,
)
from gopo_lightning.types import Completions, PromptBatch


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
        adapter_only: give vLLM the base once and then the LoRA adapter alone, which it adds as the policy does, instead
            of all weights with the adapter merged. Less is sent; vLLM samples somewhat slower.
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
        adapter_only: bool = False,
        check_every_n_rollouts: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_installed("VLLMEngine")
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
        self.adapter_only = adapter_only
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
        with torch.autocast(device.type, enabled=False), undisturbed():
            # What may fail on one rank alone ends before others enter a collective: gathering, and maybe a forward.
            with all_or_none("preparing vLLM"):
                self._check(model, device, dtype, prompts, sampling)
            if self._llm is None:
                self._mode = logprobs_mode(sampling)
                with all_or_none("starting vLLM"):
                    self._llm = self._start(model, tokenizer, device, dtype)
                    self._check(model, device, dtype, prompts, sampling)
                self._sleep()
            self._load(model, dtype)
            adapter = vllm_adapter.requested(model, self._rollouts + 1) if self.adapter_only else nullcontext()
            with adapter as request, all_or_none("sampling with vLLM"):
                outputs = self._sample(prompts, num_completions, sampling, seeds_N, eos_token_ids, request)
                completions = to_completions(outputs, tokenizer, prompts, sampling, eos_token_ids, self._mode, device)
            self._sleep()
        if self._rollouts % self.check_every_n_rollouts == 0:
            check_logprobs(model, prompts, completions, outputs, sampling, self._mode)
        self._rollouts += 1
        return completions

    def _check(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        prompts: PromptBatch,
        sampling: SamplingConfig,
    ) -> None:
        """ValueError for what this vLLM does not do."""
        check_supported(sampling, logprobs=False)
        if self._llm is not None:
            self._check_same(model, device, dtype)
            limit = self._llm.model_config.max_model_len
            check_lengths(prompts, sampling, limit, "VLLMEngine", "its max_model_len")

    def _start(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
    ) -> Any:
        if self.sleep and device.type == "cpu":
            raise ValueError("sleep=True of VLLMEngine needs a GPU, but the policy is on CPUs; leave it out.")
        options = {**self.options, "enable_sleep_mode": True} if self.sleep else self.options
        if not self.adapter_only:
            return start(model, tokenizer, device, dtype, self._mode, options)
        options = {**options, **vllm_adapter.options_for(model)}
        with vllm_adapter.base_given(model, dtype):
            return start(model, tokenizer, device, dtype, self._mode, options, vllm_adapter.LOAD_FORMAT)

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

    def _load(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Today's weights; what was computed with others is forgotten."""

        def load(worker: Any) -> None:
            # copies: vLLM keeps some until the end, when sharded weights are gone
            weights = ((name, value.to(dtype, copy=True)) for name, value in merged_weights(model))
            worker.reload_weights(weights_iterator=weights)

        if self.sleep:
            self._llm.wake_up(tags=["weights"])
        if not self.adapter_only:
            self._llm.collective_rpc(load)
        if self.sleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleep:  # at level 2 nothing is kept, for the weights come anew; at 1 the weights wait on the CPU
            self._llm.sleep(level=1 if self.adapter_only else 2)

    def _sample(
        self,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        seeds_N: Sequence[int],
        eos_token_ids: Sequence[int],
        adapter: Any,
    ) -> list[Sampled]:
        """vLLM's completions, N of them; its cache computes a prompt once."""
        from vllm import SamplingParams, TokensPrompt

        rows = [p.token_ids for p in prompts.prompts for _ in range(num_completions)]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(row)) for row in rows],
            [SamplingParams(**sampling_parameters(sampling, seed, eos_token_ids)) for seed in seeds_N],
            use_tqdm=False,
            lora_request=adapter,
        )
        return [_sampled(output.outputs[0]) for output in outputs]


def _sampled(output: Any) -> Sampled:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return Sampled(output.token_ids, [step[token].logprob for token, step in steps], output.finish_reason == "length")
