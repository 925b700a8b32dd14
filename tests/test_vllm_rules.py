"""What the vLLM engine decides by itself, with a stand-in for vLLM: a copy of the policy with weights of its own."""

import importlib.machinery
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.rollout import SamplingConfig, VLLMEngine
from gopo_lightning.rollout.engines import vllm as vllm_engine
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.rollout.engines.vllm_results import Sampled, to_completions
from gopo_lightning.rollout.engines.vllm_start import check_supported
from gopo_lightning.types import Completions
from tests.architectures import build, prompt_batch
from tests.conftest import byte_tokenizer
from tests.runs import make_data, make_module, make_trainer


class StandIn:
    """Takes the place of ``vllm.LLM``: draws from logits at the temperature, and reports log-probs by its mode."""

    def __init__(
        self, model: str, *, dtype: str, load_format: str, logprobs_mode: str, generation_config: str, **options: Any
    ) -> None:
        if "max_num_seqs" in options:
            raise MemoryError(f"no room in {model} for {options['max_num_seqs']} sequences")
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.mode, self.model_config = logprobs_mode, SimpleNamespace(max_model_len=128)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def collective_rpc(self, function: Any) -> None:
        function(self)

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.model.load_state_dict(dict(weights_iterator), strict=False)

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool, lora_request: None) -> list[Any]:
        return [self._one(p["prompt_token_ids"], q) for p, q in zip(prompts, params, strict=True)]

    def _one(self, prompt: list[int], params: Any) -> Any:
        tokens, logprobs, generator = list(prompt), [], torch.Generator().manual_seed(params.seed)
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
            filtered = logits / (params.temperature or 1.0)
            if params.top_k:
                filtered = filtered.masked_fill(filtered < filtered.topk(params.top_k).values[-1], -torch.inf)
            drawn = int(torch.multinomial(filtered.softmax(-1), 1, generator=generator))
            reported = (filtered if self.mode == "processed_logprobs" else logits).log_softmax(-1)
            logprobs.append({drawn: SimpleNamespace(logprob=float(reported[drawn]))})
            tokens.append(drawn)
        output = SimpleNamespace(token_ids=tokens[len(prompt) :], logprobs=logprobs, finish_reason="length")
        return SimpleNamespace(outputs=[output])


@dataclass
class EngineArgs:
    enforce_eager: bool = False
    max_num_seqs: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, arguments = ModuleType("vllm"), ModuleType("vllm.engine.arg_utils")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams, package.TokensPrompt = StandIn, SimpleNamespace, dict  # type: ignore[attr-defined]
    arguments.EngineArgs = EngineArgs  # type: ignore[attr-defined]
    modules = {"vllm": package, "vllm.engine": ModuleType("vllm.engine"), "vllm.engine.arg_utils": arguments}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def generate(engine: VLLMEngine, model: nn.Module, **options: Any) -> Completions:
    prompts = prompt_batch((5, 9))
    return engine.generate(
        model,
        byte_tokenizer(),
        prompts,
        2,
        SamplingConfig(**({"max_new_tokens": 6} | options)),
        seeds_N=stream_seeds(0, 0, [p.index for p in prompts.prompts], 2),
        eos_token_ids=(1,),
    )


def lose(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """From now on weights whose names hold any of ``parts`` do not arrive."""
    real = vllm_engine.merged_weights
    monkeypatch.setattr(
        vllm_engine,
        "merged_weights",
        lambda model: ((name, value) for name, value in real(model) if not any(part in name for part in parts)),
    )


@torch.no_grad()
def update(model: nn.Module, only: str = "") -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.add_(torch.randn_like(parameter) * 0.5)


def test_weights_that_no_longer_arrive_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine, seldom = build("llama"), VLLMEngine(), VLLMEngine(check_every_n_rollouts=3)
    for _ in range(2):
        update(model)
        for each in (engine, seldom):
            generate(each, model)
    lose(monkeypatch, "")
    update(model)
    with pytest.raises(ValueError, match=r"log-probs differ from those of LlamaForCausalLM by \d.* not all weights"):
        generate(engine, model)
    generate(seldom, model)
    with pytest.raises(ValueError, match="log-probs differ"):  # its fourth
        generate(seldom, model)


def test_an_adapter_that_does_not_arrive_is_noticed_when_it_is_no_longer_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    engine = VLLMEngine()
    base = {name: value.clone() for name, value in vllm_engine.merged_weights(model)}
    monkeypatch.setattr(vllm_engine, "merged_weights", lambda _: iter(base.items()))
    generate(engine, model)
    update(model, only="lora")
    with pytest.raises(ValueError, match="log-probs differ"):
        generate(engine, model)


@pytest.mark.parametrize("first", [1.0, 0.7])
def test_log_probs_are_the_policys_at_the_temperature_of_the_call_or_none(first: float) -> None:
    """What vLLM reports is fixed at its start; calls with other settings get the policy's numbers or none."""
    model, engine = build("llama"), VLLMEngine()
    known = {}
    for options in (
        {"temperature": first},
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
    ):
        completions = generate(engine, model, **options)
        theirs_NT = completions.sampler_logprobs_NT
        known[str(options)] = theirs_NT is not None
        if theirs_NT is not None:
            temperature = options["temperature"]
            ours_NT = completion_logprobs(model, prompt_batch((5, 9)), completions, temperature=temperature).logprobs_NT
            torch.testing.assert_close(theirs_NT, ours_NT.detach(), atol=1e-4, rtol=1e-4)
    assert list(known.values()) == ([True, False, False] if first == 1.0 else [True, True, False])


def test_a_precision_or_model_other_than_at_the_start_is_refused() -> None:
    model, engine = build("llama"), VLLMEngine()
    generate(engine, model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"dtype torch.float32 .* torch.bfloat16"),
    ):
        generate(engine, model)
    with pytest.raises(ValueError, match=r"model llama and is now asked for qwen2"):
        generate(engine, build("qwen2"))


@pytest.mark.parametrize(
    ("options", "logprobs", "message"),
    [
        ({"temperature": 1e-3}, False, r"temperature=0.001 must be 0 or in \[0.01, 2.0\]"),
        ({"temperature": 5.0}, False, r"temperature=5.0 must be 0 or in \[0.01, 2.0\]"),
        ({"temperature": 0.7, "top_k": 5}, True, r"sampler_correction_cap needs .* for top_k=5 at .*temperature=0.7"),
        ({"temperature": 0.7, "min_new_tokens": 2, "top_p": 0.5}, True, r"for top_p=0.5, min_new_tokens=2 at"),
    ],
)
def test_what_vllm_cannot_do_is_refused(options: dict[str, Any], logprobs: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_supported(SamplingConfig(**options), logprobs=logprobs)


@pytest.mark.parametrize(
    ("options", "logprobs"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, True),
        ({"top_k": 5, "min_new_tokens": 2}, True),
        ({"temperature": 0.7, "top_k": 5}, False),
        ({"temperature": 0.01}, False),
        ({"temperature": 2.0}, False),
    ],
)
def test_what_vllm_can_do_is_not_refused(options: dict[str, Any], logprobs: bool) -> None:
    check_supported(SamplingConfig(**options), logprobs=logprobs)


@pytest.mark.parametrize(
    ("engine", "sampling", "message"),
    [
        ({}, {"temperature": 0.7, "top_k": 5}, "sampler_correction_cap needs the sampler's log-probs"),
        ({}, {"temperature": 1e-3}, "must be 0 or in"),
        ({"options": {"max_nun_seqs": 2}}, {}, r"\['max_nun_seqs'\] among the options of VLLMEngine: vllm.LLM has no"),
    ],
)
@pytest.mark.filterwarnings("ignore:top_p=")
def test_a_run_is_refused_before_it_begins(
    engine: dict[str, Any],
    sampling: dict[str, Any],
    message: str,
    tiny_policy: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollouts: list[int] = []
    monkeypatch.setattr(VLLMEngine, "generate", lambda *_, **__: rollouts.append(1))
    module = make_module(
        tiny_policy,
        engine=VLLMEngine(**engine),
        sampling=SamplingConfig(max_new_tokens=4, **sampling),
        loss=ClippedSurrogate(sampler_correction_cap=2.0),
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, make_data(prompts_file))
    assert not rollouts


def test_what_keeps_vllm_from_starting_is_a_value_error_with_a_remedy() -> None:
    with pytest.raises(
        ValueError,
        match=r"(?s)does not start for LlamaForCausalLM with .*'max_num_seqs': 9.* MemoryError: no room in "
        r"LlamaForCausalLM for 9 .*TransformersEngine",
    ):
        generate(VLLMEngine(options={"max_num_seqs": 9}), build("llama"))
    with pytest.raises(ValueError, match="check_every_n_rollouts=0 must be at least 1"):
        VLLMEngine(check_every_n_rollouts=0)


@pytest.mark.parametrize("eager", [False, True])
def test_a_start_says_that_it_compiles_and_leaves_the_signals_heard(
    eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("gopo_lightning.rollout.engines.vllm_start.rank_zero_info", said.append)
    before = signal.getsignal(signal.SIGTERM)
    generate(VLLMEngine(options={"enforce_eager": eager}), build("llama"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(said) == 1 and ("minutes" in said[0]) is not eager


def test_a_draw_from_no_distribution_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn_from_nothing(output: Any) -> Sampled:
        return Sampled(output.token_ids, [torch.nan] * len(output.token_ids), True)

    monkeypatch.setattr(vllm_engine, "_sampled", drawn_from_nothing)
    with pytest.raises(RuntimeError, match="token 1 of a completion of the prompt in row 0 cannot be drawn"):
        generate(VLLMEngine(), build("llama"))


def test_completions_of_unequal_length_are_padded_and_masked() -> None:
    """The end of each counts, and nothing behind it."""
    sampled = [Sampled([65, 66, 2], [-1.0, -2.0, -3.0], True), Sampled([67], [-4.0], False)]
    completions = to_completions(
        sampled, byte_tokenizer(), prompt_batch((5,)), SamplingConfig(), [257], "raw_logprobs", torch.device("cpu")
    )
    assert completions.sampler_logprobs_NT is not None
    assert completions.sampler_logprobs_NT.tolist() == [[-1, -2, -3], [-4, 0, 0]]
    assert completions.tokens_NT.tolist() == [[65, 66, 2], [67, 258, 258]]
    assert completions.mask_NT.tolist() == [[True, True, True], [True, False, False]]
    assert completions.truncated_N.tolist() == [True, False]
