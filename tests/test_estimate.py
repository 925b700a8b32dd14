"""`estimate`: its formulas by hand, its sizes by the models, its memory by what two steps allocate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gopo_lightning.commands import estimate
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.commands.run_plan import plan_of
from gopo_lightning.evaluation import footprint
from gopo_lightning.evaluation.footprint import Decoder, Frozen, Plan
from gopo_lightning.evaluation.sizes import policy_sizes
from gopo_lightning.policy.model import PolicyConfig, load_policy
from tests.conftest import save_llama
from tests.event_runs import write_events

MODEL = Decoder(
    weights=1000,
    trainable=1000,
    matmul=800,
    largest_layer=300,
    layers=2,
    hidden=10,
    intermediate=20,
    heads=10,
    kv_heads=5,
    vocabulary=7,
)
PLAN = Plan(MODEL, P=2, G=4, L=5, T=3, process=100.0)


def test_one_device() -> None:
    phases = footprint.phases(PLAN)
    state = {"process": 100, "weights": 4000, "optimiser states": 8000}
    assert phases["sampling"] == {
        **state,
        "weights for sampling": 2 * (800 + 70),
        "keys and values": 2 * 2 * 5 * (2 * 5 + 8 * 3) * 2,
        "logits": 8 * 7 * (2 + 8),
    }
    tokens, layer = 2 * (5 + 4 * 3), 2 * (20 + 20 + 10 + 80) + 4 * 40
    assert phases["forward and backward"] == {
        **state,
        "gradients": 4000,
        "weights for training": 2 * 870,
        "activations": tokens * (2 * layer + 120),
        "logits": tokens * 7 * (4 + 4),
    }
    on_cpus = footprint.phases(replace(PLAN, by_blocks=True))
    assert on_cpus["sampling"]["logits"] == 8 * 7 * 2 and on_cpus["forward and backward"]["logits"] == tokens * 7 * 4
    again = footprint.training(replace(PLAN, gradient_checkpointing=True))
    assert again["activations"] == tokens * (2 * 40 + 120) and again["a layer again"] == tokens * layer
    assert "logits" not in again and "logits" in footprint.training(
        replace(PLAN, gradient_checkpointing=True, policy=replace(MODEL, vocabulary=100))
    )
    assert phases["optimiser step"] == {**state, "gradients": 4000, "temporaries": 4000}
    assert "scoring" not in phases


def test_strategies() -> None:
    sharded = replace(PLAN, strategy="fsdp2", ranks=4)
    parts = footprint.phases(sharded)
    assert parts["optimiser step"] == {
        "process": 100,
        "weights": 1000,
        "optimiser states": 2000,
        "gradients": 1000,
        "temporaries": 1000,
    }
    assert parts["sampling"]["weights for sampling"] == 2000
    assert parts["forward and backward"]["weights for training"] == 2 * 300 * 2
    layered = footprint.phases(replace(sharded, rollout_gather="layer"))
    assert layered["sampling"]["weights for sampling"] == 2 * 300 * 2
    offloaded = footprint.phases(replace(sharded, cpu_offload=True))["forward and backward"]
    assert offloaded["weights"] == offloaded["optimiser states"] == offloaded["gradients"] == 0
    assert footprint.gradients(replace(PLAN, strategy="ddp", ranks=2)) == {"gradients": 8000}


def test_frozen_models() -> None:
    reward = Frozen("rm", MODEL, 2, tokens=6, all_tokens=60)
    for how, waiting, brought in (("replicate", 2000, 0), ("offload", 0, 2000), ("shard", 500, 1200)):
        plan = replace(PLAN, frozen=(reward,), frozen_models=how, strategy="fsdp2", ranks=4)
        scoring = footprint.phases(plan)["scoring"]
        assert scoring["rm"] == waiting
        assert scoring["reward model at work"] == brought + 6 * (30 + 20 + 10 + 60) * 2


def test_micro_batches() -> None:
    for budget, groups in ((None, 2), (1, 1), (17, 1), (33, 1), (34, 2), (1000, 2)):
        assert footprint.micro_batch(replace(PLAN, micro_batch_tokens=budget)) == groups * 17
    assert footprint.micro_batch(replace(PLAN, num_minibatches=2)) == 17
    assert footprint.micro_batch(replace(PLAN, shared=False)) == 2 * 4 * 8


def test_operations() -> None:
    found = footprint.flops(replace(PLAN, frozen=(Frozen("rm", MODEL, 2, 6, 60),), frozen_logprobs=1))
    pairs = 2 * (12.5 + 4 * (15 + 4.5))
    once = 2 * 800 * 34 + 2 * 70 * 24 + 4 * 10 * 2 * pairs
    assert found == {
        "sampling": once,
        "training": 4 * once,
        "scoring": 2 * 800 * 60 + 4 * 10 * 2 * 60 * 4,
    }
    adapter = replace(PLAN, policy=replace(MODEL, trainable=10), gradient_checkpointing=True)
    assert footprint.flops(adapter)["training"] == 3 * once


def test_knobs_name_what_helps() -> None:
    large = replace(MODEL, weights=10**5, trainable=10**5)  # beside which an adapter is small
    plan = replace(PLAN, policy=large, P=64, ranks=8, frozen=(Frozen("reference", large, 4),))
    names = " ".join(footprint.knobs(plan))
    for knob in ("gradient_checkpointing", "micro_batch_tokens", "fsdp2", "lora", "offload"):
        assert knob in names
    for name, changed in footprint.knobs(PLAN).items():
        assert footprint.peak(changed) < footprint.peak(PLAN), name


# ---------------------------------------------------------------------------------------------------------- of models


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_sizes_are_those_of_the_model(lora: dict[str, Any] | None, tiny_policy: Path) -> None:
    config = PolicyConfig(str(tiny_policy), lora=lora)
    model = load_policy(config)
    found, weight_bytes = policy_sizes(config)
    assert weight_bytes == 4 and found.layers == 2 and found.hidden == 32 and found.kv_heads == 16
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert found.matmul == linear + (0 if lora is None else found.trainable)
    if lora is not None:
        assert footprint.with_lora(policy_sizes(PolicyConfig(str(tiny_policy)))[0], 4).trainable == found.trainable


class Allocated(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that operations inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The freed ones go first: a new storage may lie where one of them lay, and would be taken for it.
        self.alive = {key: (ref, n) for key, (ref, n) in self.alive.items() if not ref.expired()}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.device.type == "cpu"):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return result


def write_config(folder: Path, **groups: Any) -> Path:
    """Two steps of 4 × 4 completions of 24 tokens, of a random Llama of 35,000 weights."""
    policy = save_llama(folder / "policy", num_key_value_heads=2, max_position_embeddings=256)
    (folder / "prompts.jsonl").write_text('{"prompt": "%s"}\n' % ("a" * 64) * 8)
    init_args = {
        "policy": {"name": str(policy)},
        "rollout": {"num_completions": 4, "sampling": {"max_new_tokens": 24, "min_new_tokens": 24}},
        "rewards": {
            "sources": [
                {
                    "class_path": "gopo_lightning.rewards.FunctionReward",
                    "init_args": {"function": "gopo_lightning.rewards.examples.distinct_words"},
                }
            ]
        },
        "update": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}}},
    }
    init_args = {name: {**fields, **groups.get(name, {})} for name, fields in init_args.items()}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "enable_checkpointing": False}
    data = {"prompts_per_step": 4, "max_prompt_tokens": 64, "train": {"path": str(folder / "prompts.jsonl")}}
    config = {
        "trainer": {**trainer, "default_root_dir": str(folder), "enable_progress_bar": False},
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": init_args},
        "data": {"class_path": "gopo_lightning.PromptDataModule", "init_args": data},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"policy": {"gradient_checkpointing": True}},
        {"update": {"micro_batch_tokens": 1}},
        {"policy": {"lora": {"r": 4, "target_modules": "all-linear"}}},
    ],
    ids=str,
)
def test_within_a_third_of_what_is_allocated(groups: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, **groups)
    plan = replace(plan_of([f"--config={config}"], cpu=True).plan, process=0.0)
    with Allocated() as allocated:
        run(["fit", f"--config={config}"])
    assert 3 / 4 < footprint.peak(plan) / allocated.peak < 4 / 3


def test_what_is_not_counted_is_said(tmp_path: Path) -> None:
    assert not any("counted" in note for note in plan_of([f"--config={write_config(tmp_path)}"], cpu=True).notes)
    clusters = {"class_path": "gopo_lightning.rollout.NearEmbeddings", "init_args": {"encoder": "an/encoder"}}
    entropy = {"class_path": "gopo_lightning.rollout.SemanticEntropy", "init_args": {"clusters": clusters}}
    config = f"--config={write_config(tmp_path)}"
    for more, expected in (
        (
            f"--model.init_args.rewards.transforms={json.dumps([entropy])}",
            "the encoder an/encoder, by which a transform",
        ),
        ("--config=configs/methods/zo_ranksgd.yaml", "RankedPerturbation has no backward pass"),
    ):
        assert expected in " ".join(plan_of([config, more], cpu=True).notes)
    term = {"data": {"path": str(tmp_path / "rows.jsonl")}, "loss": {"class_path": "gopo_lightning.objectives.PRO"}}
    also = f"--model.init_args.objective.also={json.dumps([term | {'num_completions': 4, 'prompts_per_step': 4}])}"
    notes = " ".join(plan_of([config, also], cpu=True).notes)
    assert "objective.also 'recorded' adds 4 groups of 4 to the updates, whose time is not counted" in notes


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = [f"--config={write_config(tmp_path)}"]
    speeds = ["--tokens-per-second=384", "--tflops=1e-6", "--utilisation=0.5"]
    estimate.main([*config, "--cpu", "--gpu-memory=0.6GB", *speeds, "--trainer.max_steps=7200"])
    said = capsys.readouterr().out
    assert "1 device, each with 4 prompts × 4 completions" in said and "at most 64 + 24 tokens" in said
    assert "It is tight" in said and "policy.gradient_checkpointing: true" in said
    flops = footprint.flops(plan_of(config).plan)["training"]
    assert "sampling 1 s" in said and f"training {flops / 5e5:.3g} s" in said
    estimate.main([*config, "--gpus=2", "--gpu-memory=0.1GB", "--prompt-tokens=20"])
    said = capsys.readouterr().out
    assert "ddp, 2 devices, each with 2 prompts" in said and "at most 20 + 24 tokens" in said
    assert "It does not fit" in said and "trainer.strategy: fsdp2" in said
    assert "no time without --tokens-per-second for sampling and --tflops for training" in said


def test_a_measured_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "measured"
    values = {"rollout": [1.0, 384.0], "train": [1.0, 192.0]}  # the first step is left out
    tags = {f"throughput/{name}_tokens_per_second": dict(enumerate(v, start=1)) for name, v in values.items()}
    tags |= {"completion/length_mean": {1: 24.0, 2: 24.0}, "seconds/reward": {1: 9.0, 2: 0.5}, "train/loss": {1: 0.0}}
    write_events(run_folder, tags)
    estimate.main([f"--config={write_config(tmp_path)}", f"--run={run_folder}"])
    said = capsys.readouterr().out
    assert "384 completion tokens" in said and "3.5 s a step: sampling 1 s, training 2 s, scoring 0.5 s" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "estimate needs the configuration"),
        (["--config=x", "--gpus=0"], "--gpus=0: it must be above 0"),
        (["--config=x", "--utilisation=30"], "--utilisation=30.0: it is a share"),
        (["--config=x", "--gpu-memory=much"], "--gpu-memory='much' is no size"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate.main(arguments)


def test_errors_of_the_configuration(tmp_path: Path) -> None:
    config = f"--config={write_config(tmp_path)}"
    with pytest.raises(ValueError, match="prompts_per_step=4 cannot be divided over 3 ranks"):
        plan_of([config], gpus=3)
    with pytest.raises(ValueError, match="trainer.strategy=deepspeed is not known to estimate"):
        plan_of([config, "--trainer.strategy=deepspeed"])
