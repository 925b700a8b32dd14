"""vLLM beside the transformers engine: the same policy, the same contract. Needs vLLM (`make test-vllm`)."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.distributed.gathering import gathered
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.model import PolicyConfig, load_policy
from gopo_lightning.rollout import SamplingConfig, TransformersEngine, VLLMEngine
from gopo_lightning.rollout.engines.base import RolloutEngine
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.types import Completions, PromptBatch
from tests.architectures import prompt_batch
from tests.conftest import byte_tokenizer
from tests.ranks import Case, launch, sharded_policy
from tests.runs import make_data, make_trainer

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    # inside vLLM
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,  # vLLM's kernels want heads of 32 and more
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
# blocks so short that prompts are found in the cache again
OPTIONS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26, "block_size": 32}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def engines() -> dict[str, VLLMEngine]:
    """All of them until the end: vLLM's engines of a process share what goes with the first that is freed."""
    kinds = (*MODELS, "at a temperature", "without some weights", "float32")
    return {kind: VLLMEngine("float32" if kind == "float32" else "auto", options=OPTIONS) for kind in kinds}


def generate(
    engine: RolloutEngine,
    model: nn.Module,
    prompts: PromptBatch,
    num_completions: int = 2,
    seed: int = 0,
    eos: tuple[int, ...] = (257,),
    **options: Any,
) -> Completions:
    return engine.generate(
        model,
        byte_tokenizer(),
        prompts,
        num_completions,
        SamplingConfig(**{"max_new_tokens": 12} | options),
        seeds_N=stream_seeds(seed, 0, [p.index for p in prompts.prompts], num_completions),
        eos_token_ids=eos,
    )


def assert_same(actual: Completions, expected: Completions) -> None:
    for name in ("tokens_NT", "mask_NT", "truncated_N"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.texts == expected.texts
    torch.testing.assert_close(actual.sampler_logprobs_NT, expected.sampler_logprobs_NT, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_the_other_engine(name: str, policies: dict[str, Path], engines: dict[str, Any]) -> None:
    """With everything that ends a completion; then with other weights, on the prompts that vLLM has in its cache."""
    model, prompts = load_policy(PolicyConfig(str(policies[name]))).train(), prompt_batch((40, 70, 36))
    state, settings = torch.get_rng_state(), (torch.get_num_threads(), torch.set_num_threads)
    before = copy.deepcopy(model.state_dict())
    variants: list[dict[str, Any]] = [
        {},
        {"eos": tuple(range(60))},
        {"eos": tuple(range(60)), "min_new_tokens": 5},
        {"stop_strings": tuple("aeiou%<>WmMX 1234567\n")},
        {"stop_strings": tuple("aeiou%<>WmMX 1234567\n"), "min_new_tokens": 6},
    ]
    lengths = []
    for _ in range(2):
        for variant in variants:
            expected = generate(TransformersEngine(), model, prompts, temperature=0.0, **variant)
            assert_same(generate(engines[name], model, prompts, temperature=0.0, **variant), expected)
            lengths.append(expected.lengths_N.tolist())
        assert all(m.training for m in model.modules())
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3).add_(0.02)
        before = copy.deepcopy(model.state_dict())
    assert len({tuple(row) for row in lengths[:5]}) == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.set_num_threads) == settings


def test_completions_have_streams_of_their_own(policies: dict[str, Path], engines: dict[str, Any]) -> None:
    model, prompts, engine = load_policy(PolicyConfig(str(policies["llama"]))), prompt_batch((20, 33)), engines["llama"]
    together = generate(engine, model, prompts, 3)
    assert len(set(together.texts)) == 6
    swapped = generate(engine, model, prompts.select(torch.tensor([1, 0])), 3)
    assert swapped.texts == together.texts[3:] + together.texts[:3]
    assert generate(engine, model, prompts, 3).texts == together.texts
    assert generate(engine, model, prompts, 3, seed=1).texts != together.texts


@pytest.mark.parametrize(
    ("options", "known"),
    [({}, True), ({"top_p": 0.5, "min_new_tokens": 3}, True), ({"temperature": 0.7, "top_k": 5}, False)],
)
def test_log_probs_are_those_of_the_policy_or_none(
    options: dict[str, Any], known: bool, policies: dict[str, Path], engines: dict[str, Any]
) -> None:
    model, prompts = load_policy(PolicyConfig(str(policies["llama"]))), prompt_batch((20, 33))
    completions = generate(engines["llama"], model, prompts, 3, eos=tuple(range(20)), **options)
    if not known:
        assert completions.sampler_logprobs_NT is None
        return
    assert len(set(completions.lengths_N.tolist())) > 1
    expected = completion_logprobs(model, prompts, completions).logprobs_NT.detach()
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected, atol=1e-3, rtol=1e-3)


def test_log_probs_at_a_temperature(policies: dict[str, Path], engines: dict[str, Any]) -> None:
    model, prompts = load_policy(PolicyConfig(str(policies["llama"]))), prompt_batch((20, 33))
    completions = generate(engines["at a temperature"], model, prompts, 3, temperature=0.7)
    expected = completion_logprobs(model, prompts, completions, temperature=0.7).logprobs_NT.detach()
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected, atol=1e-3, rtol=1e-3)


def test_its_precision_is_its_own(policies: dict[str, Path], engines: dict[str, Any]) -> None:
    model, prompts = load_policy(PolicyConfig(str(policies["llama"]))), prompt_batch((20, 33))
    with torch.autocast("cpu", torch.bfloat16):
        completions = generate(engines["float32"], model, prompts, 3)
    expected = completion_logprobs(model, prompts, completions).logprobs_NT.detach()
    torch.testing.assert_close(completions.sampler_logprobs_NT, expected, atol=1e-3, rtol=1e-3)


def test_an_adapter_is_sampled_from(policies: dict[str, Path], engines: dict[str, Any]) -> None:
    base: PreTrainedModel = load_policy(PolicyConfig(str(policies["qwen2"])))  # type: ignore[assignment]
    prompts, plain = prompt_batch((20, 33)), generate(TransformersEngine(), base, prompt_batch((20, 33)), temperature=0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = generate(TransformersEngine(), model, prompts, temperature=0.0)
    assert expected.texts != plain.texts
    assert_same(generate(engines["qwen2"], model, prompts, temperature=0.0), expected)
    with model.disable_adapter():
        assert_same(generate(engines["qwen2"], model, prompts, temperature=0.0), plain)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"], ids=str)
def test_an_adapter_alone_is_sampled_from(targets: Any, policies: dict[str, Path], adapter_engine: VLLMEngine) -> None:
    """As it is at each rollout, beside a base that was given once; switched off, the base is sampled from."""
    base: PreTrainedModel = load_policy(PolicyConfig(str(policies["qwen2"])))  # type: ignore[assignment]
    prompts, plain = prompt_batch((20, 33)), generate(TransformersEngine(), base, prompt_batch((20, 33)), temperature=0)
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    texts = set()
    for _ in range(3):
        expected = generate(TransformersEngine(), model, prompts, temperature=0.0)
        assert_same(generate(adapter_engine, model, prompts, temperature=0.0), expected)
        texts.add(expected.texts)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.3).add_(0.01)
    assert len(texts) == 3 and plain.texts not in texts
    with model.disable_adapter():
        assert_same(generate(adapter_engine, model, prompts, temperature=0.0), plain)


@pytest.fixture(scope="module")
def adapter_engine() -> VLLMEngine:
    return VLLMEngine(adapter_only=True, options=OPTIONS)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "sends the adapter alone: set policy.lora"),
        ({"use_dora": True}, "adapter of another kind than LoRA on a linear layer"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save, bias or trainable_token_indices"),
        ({"r": 600}, "rank 600 is above vLLM's 512"),
    ],
)
def test_adapters_that_cannot_be_sent_alone(lora: Any, message: str, policies: dict[str, Path]) -> None:
    model = load_policy(PolicyConfig(str(policies["qwen2"])))
    if lora is not None:
        options = {"r": 4, "target_modules": ["q_proj"], **lora}
        model = get_peft_model(model, LoraConfig(**options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        generate(VLLMEngine(adapter_only=True, options=OPTIONS), model, prompt_batch((5,)))


def test_weights_that_do_not_arrive_are_noticed(
    policies: dict[str, Path], engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gopo_lightning.rollout.engines import vllm as vllm_engine

    def some(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, value) for name, value in real(model) if "o_proj" not in name)

    real = vllm_engine.merged_weights
    monkeypatch.setattr(vllm_engine, "merged_weights", some)
    model = load_policy(PolicyConfig(str(policies["llama"])))
    with pytest.raises(ValueError, match="vLLM's log-probs differ from those of LlamaForCausalLM by"):
        generate(engines["without some weights"], model, prompt_batch((20,)))


def test_what_it_cannot_do_is_refused(policies: dict[str, Path], engines: dict[str, Any]) -> None:
    model = load_policy(PolicyConfig(str(policies["llama"])))
    with pytest.raises(ValueError, match=r"a prompt of 120 tokens with max_new_tokens=12 .* the 128 tokens"):
        generate(engines["llama"], model, prompt_batch((20, 120)))
    with pytest.raises(ValueError, match="tensor_parallel_size=2 among the options of VLLMEngine: the engine decides"):
        VLLMEngine(options={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match="max_model_len=8 among the options of VLLMEngine: set the engine's own field"):
        VLLMEngine(options={"max_model_len": 8})
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        VLLMEngine(dtype="int8")  # type: ignore[arg-type]


def test_its_memory_is_the_trainers_between_rollouts(
    policies: dict[str, Path], engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls; sleeping itself needs a GPU."""
    model, prompts, calls = load_policy(PolicyConfig(str(policies["llama"]))), prompt_batch((20,)), []
    expected = generate(engines["llama"], model, prompts)

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                calls.append((name, *options.values()) if name in ("sleep", "wake_up") else (name,))
                return None if name in ("sleep", "wake_up") else getattr(engines["llama"]._llm, name)(*args, **options)

            return engines["llama"]._llm.model_config if name == "model_config" else call

    engine = VLLMEngine(sleep=True, options=OPTIONS)
    with pytest.raises(ValueError, match="sleep=True of VLLMEngine needs a GPU"):
        generate(engine, model, prompts)
    monkeypatch.setattr(engine, "_start", lambda *_: Recorder())
    assert generate(engine, model, prompts).texts == generate(engine, model, prompts).texts == expected.texts
    rollout = ["wake_up weights", "collective_rpc", "wake_up kv_cache", "reset_prefix_cache", "generate", "sleep 2"]
    assert [" ".join(map(str, call)).replace("['", "").replace("']", "") for call in calls] == ["sleep 2", *rollout * 2]


def greedy_on_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Of plain and sharded weights; the ranks have unlike prompts."""
    found, engine, prompts = {}, VLLMEngine(options=OPTIONS), prompt_batch((20, 33, 17)[rank : 2 * rank + 1])
    config = PolicyConfig(str(folder))
    found["plain"] = generate(engine, load_policy(config), prompts, temperature=0.0).texts
    assert engine._llm.collective_rpc(lambda worker: (worker.local_rank, worker.rank)) == [(rank, rank)]  # its device
    model = sharded_policy(config)
    for how in ("full", "layer"):
        with gathered(model, how):  # type: ignore[arg-type]
            found[how] = generate(engine, model, prompts, temperature=0.0).texts
    return found


def adapter_on_ranks(rank: int, folder: Path) -> list[Any]:
    """An adapter alone, of sharded weights."""
    engine, prompts = VLLMEngine(adapter_only=True, options=OPTIONS), prompt_batch((20, 33, 17)[rank : 2 * rank + 1])
    return [generate(engine, with_adapter(folder, sharded), prompts, temperature=0.0).texts for sharded in (True, True)]


def with_adapter(folder: Path, sharded: bool) -> nn.Module:
    torch.manual_seed(3)
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "orthogonal"}
    config = PolicyConfig(str(folder), lora=lora)
    return sharded_policy(config) if sharded else load_policy(config)


def test_greedy_on_two_ranks_is_that_of_one(policies: dict[str, Path], prompts_file: Path, tmp_path: Path) -> None:
    cases = [Case("first", "ddp", max_steps=1), greedy_on_ranks, adapter_on_ranks]
    launch(cases, policies["llama"], prompts_file, tmp_path, 2)
    model = load_policy(PolicyConfig(str(policies["llama"])))
    for rank in (0, 1):
        prompts = prompt_batch((20, 33, 17)[rank : 2 * rank + 1])
        expected = generate(TransformersEngine(), model, prompts, temperature=0.0).texts
        found = torch.load(tmp_path / f"greedy_on_ranks.{rank}.pt")
        assert len(found) == 3 and all(texts == expected for texts in found.values())
        adapted = generate(TransformersEngine(), with_adapter(policies["llama"], False), prompts, temperature=0.0).texts
        assert torch.load(tmp_path / f"adapter_on_ranks.{rank}.pt") == [adapted] * 2


def test_the_overlay_trains_with_log_probs_that_agree(
    policies: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    """The command line, with the one flag that users add."""
    overlay = yaml.safe_load(Path("configs/engine/vllm.yaml").read_text())
    assert overlay["model"]["init_args"].keys() == {"rollout", "objective"}
    cli = run(
        [
            "--config=configs/quickstart/gopo.yaml",
            "--config=configs/engine/vllm.yaml",
            f"--model.init_args.policy.name={policies['llama']}",
            f"--model.init_args.rollout.engine.init_args.options={json.dumps(OPTIONS)}",
            "--model.init_args.rollout.sampling.max_new_tokens=8",
            '--model.init_args.rewards.sources=[{"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": '
            '{"function": "tests.runs.count_vowels"}}]',
            f"--trainer.logger.init_args.save_dir={tmp_path}",
        ],
        instantiate_only=True,
    )
    trainer = make_trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    trainer.fit(cli.model, make_data(prompts_file))
    assert 0 < trainer.logged_metrics["train/sampler_logprob_diff"] < 0.05
