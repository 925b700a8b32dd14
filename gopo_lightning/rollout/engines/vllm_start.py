"""How vLLM is started in this process: what it may be told, what is said when it fails, what it leaves as it was."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from inspect import signature
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import world_size
from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.rollout.engines.base import SamplingConfig
from gopo_lightning.types import PromptBatch

LogprobsMode: TypeAlias = Literal["raw_logprobs", "processed_logprobs"]
"""What vLLM reports, fixed at its start: at temperature 1 before everything, or at the temperature and after filters
and bans, if there are any."""

OWN = ("model", "tokenizer", "dtype", "load_format", "tensor_parallel_size", "pipeline_parallel_size",
       "distributed_executor_backend", "enable_sleep_mode", "logprobs_mode", "generation_config",
       "enable_lora", "max_loras", "max_lora_rank")  # fmt: skip
"""Arguments of ``vllm.LLM`` that the engine decides by itself."""
_TEMPERATURES = (0.01, 2.0)
"""vLLM takes lower ones for the lowest, and refuses higher ones."""
_SHOWN_CHARACTERS = 500


def check_installed(engine: str, why: str = "") -> None:
    """ValueError where vLLM is not installed, which ``engine`` needs."""
    if find_spec("vllm") is None:
        raise ValueError(f"{engine} needs vLLM{why}: pip install 'gopo-lightning[vllm]'. Or use TransformersEngine.")


def logprobs_mode(sampling: SamplingConfig) -> LogprobsMode:
    """The mode in which vLLM gives the policy's log-probs, where there is one."""
    return "processed_logprobs" if sampling.temperature not in (0, 1) and _plain(sampling) else "raw_logprobs"


def logprob_temperature(mode: LogprobsMode, sampling: SamplingConfig) -> float | None:
    """The temperature at which vLLM's log-probs are the policy's own; None where they are after filters or bans."""
    if mode == "raw_logprobs":
        return 1.0
    return sampling.temperature if _plain(sampling) else None


def check_supported(sampling: SamplingConfig, *, logprobs: bool, mode: LogprobsMode | None = None) -> None:
    """ValueError for what vLLM would do otherwise or not at all.

    ``logprobs``: the policy's are needed; ``mode``: how they are reported, where a server has decided it already.
    """
    low, high = _TEMPERATURES
    if sampling.temperature and not low <= sampling.temperature <= high:
        raise ValueError(
            f"sampling.temperature={sampling.temperature} must be 0 or in [{low}, {high}] with vLLM, which takes "
            f"a lower one for {low} and refuses a higher one. Change it, or use TransformersEngine."
        )
    wanted = sampling.temperature or 1.0
    best = logprobs_mode(sampling)
    if logprobs and mode not in (None, best) and logprob_temperature(best, sampling) == wanted:
        raise ValueError(
            f"objective.loss.sampler_correction_cap needs the sampler's log-probs at sampling.temperature="
            f"{sampling.temperature}, but the servers report {mode}. Start them with --logprobs-mode {best}, or set "
            "sampler_correction_cap to null."
        )
    if logprobs and logprob_temperature(mode or best, sampling) != wanted:
        names = ("top_p", "top_k", "min_p", "min_new_tokens")
        others = ", ".join(f"{n}={getattr(sampling, n)}" for n in names if getattr(sampling, n) != getattr(_EXACT, n))
        raise ValueError(
            f"objective.loss.sampler_correction_cap needs the sampler's log-probs, which vLLM does not give for "
            f"{others} at sampling.temperature={sampling.temperature}. Leave these out, set temperature to 1, set "
            "sampler_correction_cap to null, or use TransformersEngine."
        )


def check_lengths(prompts: PromptBatch, sampling: SamplingConfig, limit: int, of: str, remedy: str) -> None:
    """ValueError where a prompt with its completion may outgrow the ``limit`` tokens of a vLLM."""
    longest = max(len(prompt.token_ids) for prompt in prompts.prompts)
    if longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens with max_new_tokens={sampling.max_new_tokens} may become longer than "
            f"the {limit} tokens of {of}; raise {remedy}, or cut prompts or completions"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError for an argument that ``vllm.LLM`` does not have. Imports vLLM, which takes seconds."""
    with undisturbed():
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
    known = {field.name for field in fields(EngineArgs)} | {*signature(LLM).parameters}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"{unknown} among the options of VLLMEngine: vllm.LLM has no such argument. Correct the name or remove it."
        )


def start(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    mode: LogprobsMode,
    options: Mapping[str, Any],
    load_format: str = "dummy",
) -> Any:
    """A ``vllm.LLM`` for models like ``model``; by default without weights.

    Raises:
        ValueError: vLLM does not start; the message says why, and what to change.
    """
    arguments = {"dtype": str(dtype).removeprefix("torch."), **options}
    if world_size() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"  # it joins the process group that there is
        os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    elif device.index:
        raise ValueError(
            f"VLLMEngine in one process takes the first GPU, but the policy is on {device}; set "
            f"CUDA_VISIBLE_DEVICES={device.index} and trainer.devices: 1"
        )
    compiles = "" if options.get("enforce_eager") else (
        "; it compiles the model first, which may take minutes (VLLMEngine's options: {enforce_eager: true} does not)"
    )  # fmt: skip
    rank_zero_info(f"vLLM starts{compiles}")
    from vllm import LLM

    config: Any = base_of(model).config
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            return LLM(folder, load_format=load_format, logprobs_mode=mode, generation_config="vllm", **arguments)
        except Exception as error:  # of vLLM, pydantic, transformers, torch: whatever stands in its way
            name = type(base_of(model)).__name__
            said = str(error).replace(folder, name)[:_SHOWN_CHARACTERS]
            raise ValueError(
                f"vLLM does not start for {name} with {dict(options)}: {type(error).__name__}: {said}\nCorrect "
                "gpu_memory_utilization, max_model_len or options of VLLMEngine; for models that vLLM does not run, "
                "use TransformersEngine."
            ) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """vLLM leaves random generators, threads, signal handlers and the process's settings as they were."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    with isolate_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


_EXACT = SamplingConfig()


def _plain(sampling: SamplingConfig) -> bool:
    """Nothing is cut away from the policy's distribution, nor banned."""
    return not sampling.filters and not sampling.min_new_tokens
