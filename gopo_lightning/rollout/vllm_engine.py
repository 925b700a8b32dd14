"""The rollout engine for GPUs: vLLM inside the training process, with a copy of the policy's weights."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed import world_size
from gopo_lightning.gathering import compute_device
from gopo_lightning.layers import base_of
from gopo_lightning.logprobs import completion_logprobs
from gopo_lightning.rollout.engine import (
    SamplingConfig,
    SamplingDtype,
    check_drawn,
    check_dtype,
    padding_token,
    sampling_dtype,
)
from gopo_lightning.rollout.weights import merged_weights
from gopo_lightning.structs import Completions, PromptBatch

_OWN = ("model", "tokenizer", "dtype", "load_format", "tensor_parallel_size", "pipeline_parallel_size",
        "distributed_executor_backend", "enable_sleep_mode", "logprobs_mode", "generation_config")  # fmt: skip
"""Arguments of ``vllm.LLM`` that the engine decides by itself."""
_TOLERANCE = 0.25
"""Nats: bfloat16 makes 0.02 to 0.05, weights that did not arrive several."""


class VLLMEngine:
    """Samples with vLLM on the device of the policy: one engine on each rank, which gets the weights at each rollout.

    A completion draws from a random stream of its own, as with the other engine, but in vLLM's way: another text, and
    as independent of strategy and rank up to rounding. vLLM rounds otherwise than the trainer: see
    ``train/sampler_logprob_diff`` and ``loss.sampler_correction_cap``.

    Args:
        dtype: precision of vLLM's weights. ``auto`` is that of the Trainer's ``precision``, or else of the policy's.
        gpu_memory_utilization: share of the device's memory for vLLM, its cache of keys and values included (on CPUs
            of the main memory). Training needs the rest.
        max_model_len: most tokens of a prompt with its completion, for which the cache must have room; None for the
            model's own limit.
        sleep: give vLLM's memory back between rollouts. GPUs only.
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
        options: dict[str, Any] | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError("VLLMEngine needs vLLM: pip install 'gopo-lightning[vllm]'. Or use TransformersEngine.")
        check_dtype(dtype)
        fields = {"gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len}
        self.dtype, self.sleep, self.options = dtype, sleep, fields | (options or {})
        for name, value in (options or {}).items():
            if name in _OWN or name in fields:
                where = "set the engine's own field" if name in fields else "the engine decides it; take it out"
                raise ValueError(f"{name}={value!r} among the options of VLLMEngine: {where}.")
        self._llm: Any = None

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
            ValueError: a sequence may become longer than ``max_model_len``; or, at the first call, vLLM's log-probs
                are not those of ``model``.
        """
        device, dtype, first = compute_device(model), sampling_dtype(self.dtype, model), self._llm is None
        with torch.autocast(device.type, enabled=False), _undisturbed():
            if first:
                self._llm = self._start(model, tokenizer, device, dtype, sampling)
                self._sleep()
            self._check_lengths(prompts, sampling)
            self._load(model, dtype)
            outputs = self._sample(prompts, num_completions, sampling, seeds_N, eos_token_ids)
            self._sleep()
        check_drawn(pad_sequence([_logprobs(output) for output in outputs], batch_first=True), prompts)
        completions = _completions(outputs, tokenizer, padding_token(tokenizer, eos_token_ids), sampling)
        completions = completions.to(device)
        if first:
            _check_logprobs(model, prompts, completions, outputs, sampling)
        return completions

    def _start(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
        sampling: SamplingConfig,
    ) -> Any:
        """An engine without weights for models like ``model``."""
        if self.sleep and device.type == "cpu":
            raise ValueError("sleep=True of VLLMEngine needs a GPU, but the policy is on CPUs; leave it out.")
        options: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "enable_sleep_mode": self.sleep}
        if world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"  # it joins the process group that there is
            os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
            os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        elif device.index:
            raise ValueError(
                f"VLLMEngine in one process takes the first GPU, but the policy is on {device}; set "
                f"CUDA_VISIBLE_DEVICES={device.index} and trainer.devices: 1"
            )
        from vllm import LLM

        with TemporaryDirectory() as folder:
            config: Any = base_of(model).config
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return LLM(
                folder,
                load_format="dummy",
                logprobs_mode="processed_logprobs" if _processed(sampling) else "raw_logprobs",
                generation_config="vllm",  # no defaults from a file
                **options,
                **self.options,
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


def _processed(sampling: SamplingConfig) -> bool:
    """Whether vLLM is to report log-probs at the temperature; they are also after filters and bans, if there are any.

    Else at temperature 1, before everything.
    """
    return sampling.temperature not in (0, 1) and not sampling.filters and not sampling.min_new_tokens


def _completions(
    outputs: Sequence[Any], tokenizer: PreTrainedTokenizerBase, pad: int, sampling: SamplingConfig
) -> Completions:
    rows = [torch.tensor(output.token_ids) for output in outputs]
    tokens_NT = pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths_N = torch.tensor([len(row) for row in rows])
    known = _processed(sampling) or sampling.temperature in (0, 1)
    return Completions(
        tokens_NT,
        torch.arange(tokens_NT.shape[1]) < lengths_N[:, None],
        torch.tensor([output.finish_reason == "length" for output in outputs]),
        tuple(tokenizer.batch_decode([list(output.token_ids) for output in outputs], skip_special_tokens=True)),
        pad_sequence([_logprobs(output) for output in outputs], batch_first=True) if known else None,
    )


def _logprobs(output: Any) -> torch.Tensor:
    """Of the drawn tokens, float32 [T]."""
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in steps], dtype=torch.float32)


def _check_logprobs(
    model: nn.Module, prompts: PromptBatch, completions: Completions, outputs: Sequence[Any], sampling: SamplingConfig
) -> None:
    """ValueError unless both give the first completion the same log-probs: weights may have been lost on the way."""
    first = torch.zeros(1, dtype=torch.int64)
    few = completions.select(first.to(completions.tokens_NT.device))
    temperature = sampling.temperature if _processed(sampling) else 1.0
    ours_T = completion_logprobs(model, prompts.select(first), few, temperature=temperature).logprobs_NT[0]
    difference = float((ours_T.cpu() - _logprobs(outputs[0])).abs().mean())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"vLLM's log-probs differ from those of {type(base_of(model)).__name__} by {difference:.2f} nats a token "
            f"(at most {_TOLERANCE}): it runs this model otherwise, or its weights have other names. Use "
            "TransformersEngine."
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM leaves random generators, threads and the process's settings as they were."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with isolate_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
