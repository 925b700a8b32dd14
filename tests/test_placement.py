"""Where weights are does not change a run: gathered whole or by layer, read by shards, frozen models anywhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from gopo_lightning.distributed import gathering
from gopo_lightning.distributed.fsdp import clip_grad_norm, shard_fsdp2, whole_bytes
from gopo_lightning.distributed.gathering import gathered, in_step
from gopo_lightning.distributed.offloading import on_device
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.model import PolicyConfig, load_policy
from gopo_lightning.policy.sharded_loading import fill_shards, policy_without_weights
from gopo_lightning.rewards import LocalJudge, SequenceClassifierReward
from gopo_lightning.rewards.loading import without_weights
from gopo_lightning.rollout import SamplingConfig, TransformersEngine
from gopo_lightning.training.placement import PlacementConfig
from gopo_lightning.types import PromptBatch
from tests.architectures import build, prompt_batch, ragged_completions
from tests.conftest import byte_tokenizer
from tests.ranks import Case, assert_same_run, launch, on, read, run_case, sharded_policy
from tests.runs import make_data, make_module, make_trainer

LAYER = PlacementConfig(rollout_gather="layer")
OFFLOADED = PlacementConfig(frozen_models="offload")
SHARDED = PlacementConfig(load="shards", rollout_gather="layer", frozen_models="shard")
# a new adapter is zero, and so would be the gradient of one of its factors
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "gaussian"}

RUNS = {
    "kl": Case("kl", kl_coef=0.1),
    "lora": Case("lora", kl_coef=0.1, policy={"lora": LORA}),
    "checkpointing": Case("checkpointing", policy={"gradient_checkpointing": True}),
}


SAME: dict[str, tuple[Case, str]] = {
    "by layer": (Case("layer", "fsdp2", kl_coef=0.1, module={"placement": LAYER}), "kl"),
    "offloaded": (
        Case("offload", "fsdp2", kl_coef=0.1, module={"placement": OFFLOADED}),
        "kl",
    ),
    "everything sharded": (Case("sharded", "fsdp2", kl_coef=0.1, module={"placement": SHARDED}), "kl"),
    "everything sharded, LoRA": (
        Case("sharded-lora", "fsdp2", kl_coef=0.1, policy={"lora": LORA}, module={"placement": SHARDED}),
        "lora",
    ),
    "shards in CPU memory": (
        Case("cpu-offload", "fsdp2", kl_coef=0.1, strategy_options={"cpu_offload": True}),
        "kl",
    ),
    "checkpointing": (on("fsdp2", RUNS["checkpointing"]), "checkpointing"),
    "compiled": (Case("compiled", "fsdp2", kl_coef=0.1, policy={"compile": True}), "kl"),
}


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: on this process, then on two ranks."""
    folder = tmp_path_factory.mktemp("placement")
    classifier = str(tiny_classifier(folder / "classifier"))
    for case in RUNS.values():
        run_case(replace(case, classifier=classifier), tiny_policy, prompts_file, folder, 1)
    cases = [replace(case, classifier=classifier) for case, _ in SAME.values()]
    mixed = [
        Case("bf16-mixed", "fsdp2", trainer={"precision": "bf16-mixed"}),
        Case("bf16-true", "fsdp2", trainer={"precision": "bf16-true"}),
    ]
    checks = [memory, missing_weight, tied, bf16_gathers, counts, greedy]
    launch([*cases, *mixed, *checks], tiny_policy, prompts_file, folder, 2)
    return folder


def tiny_classifier(folder: Path) -> Path:
    """A random reward model over bytes."""
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- checks that run on two ranks -------------------------------------------------------------------------------------


def memory(rank: int, folder: Path) -> dict[str, Any]:
    """Bytes of weights on this rank before, in and after a gather, and what is said where there is no room for it."""
    model = sharded_policy(PolicyConfig(str(folder)))

    def local_bytes() -> int:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return sum(tensor.untyped_storage().nbytes() for tensor in local)

    found = {"before": local_bytes(), "whole": whole_bytes(model)}
    with gathered(model):
        found["in"] = local_bytes()
        whole = list(model.parameters())
    found["after"] = local_bytes()
    found["kept"] = sum(tensor.untyped_storage().nbytes() for tensor in whole)
    room = found["whole"] - (rank == 1)  # the second rank lacks a byte
    with (
        patch.object(gathering, "free_bytes", lambda device: room),
        pytest.raises(ValueError, match=f"needs {found['whole']} bytes") as info,
        gathered(model),
    ):
        pass
    return found | {"error": str(info.value)}


def missing_weight(rank: int, folder: Path) -> dict[str, Any]:
    """What is said where the files have a weight under another name."""
    config = PolicyConfig(str(folder))
    model: Any = policy_without_weights(config)
    model.model.another_norm = nn.Parameter(torch.empty(4, device="meta"))
    shard_fsdp2(model, init_device_mesh("cpu", (2,)), dtype=None)
    with pytest.raises(ValueError, match="no tensor") as info:
        fill_shards(model, config.name, config.revision, torch.device("cpu"))
    return {"error": str(info.value)}


def tied(rank: int, folder: Path) -> dict[str, Any]:
    """A model whose head is its embeddings, read by shards and whole; the files have bfloat16."""
    build("llama").bfloat16().save_pretrained(folder / "tied")  # rank 0 alone writes
    dist.barrier()
    config = PolicyConfig(str(folder / "tied"))
    model: Any = policy_without_weights(config)
    shard_fsdp2(model, init_device_mesh("cpu", (2,)), dtype=None)
    fill_shards(model, config.name, config.revision, torch.device("cpu"))
    tokens = torch.arange(10)[None]
    return {
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "dtypes": {p.dtype for p in model.parameters()},
        "logits": model(tokens).logits,
        "expected": load_policy(config)(tokens).logits,
    }


def bf16_gathers(rank: int, folder: Path) -> dict[str, Any]:
    """Log-probs and gradients of weights that are gathered in bfloat16, beside those in float32."""
    found: dict[str, Any] = {}
    for dtype in (None, torch.bfloat16):
        model = sharded_policy(PolicyConfig(str(folder)), dtype)
        with gathered(model):
            found[f"gathered {dtype}"] = {p.dtype for p in model.parameters()}
        prompts, completions = prompt_batch(), ragged_completions()
        logprobs_NT = completion_logprobs(model, prompts, completions).logprobs_NT
        logprobs_NT.sum().backward()
        clip_grad_norm(model, 1.0)
        found[f"logprobs {dtype}"] = logprobs_NT.detach()
        found[f"gradient {dtype}"] = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
        found[f"masters {dtype}"] = {p.dtype for p in model.parameters()}
    return found


def counts(rank: int, folder: Path) -> dict[str, Any]:
    """Ranks with unlike many forwards run equally many on sharded weights, and their own on gathered ones."""
    model = sharded_policy(PolicyConfig(str(folder)))
    own = list(range(3 - 2 * rank))
    with gathered(model):
        whole = in_step(own, model, spare=-1)
    return {"layer": in_step(own, model, spare=-1), "whole": whole}


def greedy_tokens(model: nn.Module, prompts: PromptBatch, max_rows: int | None = None) -> list[list[int]]:
    """Two equal completions of each prompt, without what is drawn."""
    completions = TransformersEngine("always", max_rows=max_rows).generate(
        model,
        byte_tokenizer(),
        prompts,
        2,
        SamplingConfig(max_new_tokens=10, min_new_tokens=10, temperature=0.0),  # EOS is the likeliest everywhere
        seeds_N=[0] * 2 * len(prompts),
        eos_token_ids=[257],
    )
    return [row[mask].tolist() for row, mask in zip(completions.tokens_NT, completions.mask_NT, strict=True)]


def greedy(rank: int, folder: Path) -> dict[str, Any]:
    """Both ways to gather; the ranks have unlike prompts, and in passes of a prompt one has more of them."""
    model, found = sharded_policy(PolicyConfig(str(folder))), {}
    for how in ("full", "layer"):
        with gathered(model, how):  # type: ignore[arg-type]
            found[how] = greedy_tokens(model, prompt_batch((5, 9, 1)[rank : 2 * rank + 2]))
    with gathered(model, "layer"):
        found["layer, in passes"] = greedy_tokens(model, prompt_batch((5, 9, 1)[rank:]), max_rows=2)
    return found


# --- what they show ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", SAME)
def test_placement_does_not_change_the_run(run: str, results: Path) -> None:
    case, expected = SAME[run]
    assert_same_run(results, case.name, expected)


def test_the_reward_model_counts(results: Path) -> None:
    """Else its placement would be no test."""
    metrics = read(results, "kl")[0]["steps"][0]["metrics"]
    assert metrics["reward/reward_model/std"] > 0.1


@pytest.mark.parametrize("how", ["full", "layer", "layer, in passes"])
@pytest.mark.parametrize("rank", [0, 1])
def test_greedy_tokens_are_those_of_one_process(how: str, rank: int, results: Path, tiny_policy: Path) -> None:
    model = load_policy(PolicyConfig(str(tiny_policy)))
    last = 3 if "passes" in how else 2 * rank + 2
    expected = greedy_tokens(model, prompt_batch((5, 9, 1)[rank:last]))
    assert len({tuple(row) for row in expected}) > 1 and all(expected)
    assert torch.load(results / f"greedy.{rank}.pt")[how] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gather_takes_what_it_says_and_gives_it_back(rank: int, results: Path) -> None:
    found = torch.load(results / f"memory.{rank}.pt")
    padding = 2 * 32 * 4  # bytes: embeddings and head have 259 rows, of which each rank holds 130
    assert found["in"] == found["whole"] + padding
    assert found["before"] == found["after"] == pytest.approx(found["whole"] / 2, rel=0.02)
    assert found["kept"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_a_gather_for_which_one_has_no_memory(rank: int, results: Path) -> None:
    found = torch.load(results / f"memory.{rank}.pt")
    assert f"a rank has {found['whole'] - 1} " in found["error"]
    assert "rollout_gather: layer" in found["error"]


def test_a_weight_that_the_files_do_not_name_is_refused(results: Path) -> None:
    error = torch.load(results / "missing_weight.0.pt")["error"]
    assert "no tensor 'model.another_norm'" in error and "placement.load: whole" in error


def test_tied_weights_stay_tied_when_they_are_read_by_shards(results: Path) -> None:
    found = torch.load(results / "tied.0.pt", weights_only=False)
    assert found["tied"] and found["dtypes"] == {torch.float32}
    torch.testing.assert_close(found["logits"], found["expected"])


def test_bf16_mixed_gathers_bfloat16_and_keeps_float32_masters(results: Path) -> None:
    found = torch.load(results / "bf16_gathers.0.pt", weights_only=False)
    assert found["gathered None"] == found["masters None"] == found["masters torch.bfloat16"] == {torch.float32}
    assert found["gathered torch.bfloat16"] == {torch.bfloat16}
    exact, rounded = found["logprobs None"], found["logprobs torch.bfloat16"]
    assert 0 < (exact - rounded).abs().max() < 2**-8 * exact.abs().max() * 4
    exact, rounded = found["gradient None"], found["gradient torch.bfloat16"]
    assert (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_fsdp2_trains_under_reduced_precision(precision: str, dtype: torch.dtype, results: Path) -> None:
    record, checkpoint = read(results, precision)
    assert {tensor.dtype for tensor in checkpoint["state_dict"].values()} == {dtype}
    assert all(0 < step["metrics"]["train/grad_norm"] < 100 for step in record["steps"])


def test_forwards_that_are_collectives_are_equally_many(results: Path) -> None:
    first, second = (torch.load(results / f"counts.{rank}.pt") for rank in (0, 1))
    assert first["layer"] == first["whole"] == [0, 1, 2]
    assert second == {"layer": [0, -1, -1], "whole": [0]}


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"load": "shards"}, "placement.load: whole"),
        ({"rollout_gather": "layer"}, "placement.rollout_gather: full"),
        ({"frozen_models": "shard"}, "placement.frozen_models: offload"),
    ],
)
def test_what_the_strategy_cannot_do_is_refused(
    options: dict[str, Any], remedy: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, placement=PlacementConfig(**options))
    with pytest.raises(ValueError, match=f"use trainer.strategy: fsdp2, or {remedy}"):
        make_trainer(tmp_path).fit(module, make_data(prompts_file))


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"trainable_token_indices": [1]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_made_from_the_weights_is_refused_by_shards(option: dict[str, Any], tiny_policy: Path) -> None:
    config = PolicyConfig(str(tiny_policy), lora=LORA | option)
    with pytest.raises(ValueError, match="placement.load: whole"):
        policy_without_weights(config)


@pytest.mark.parametrize("source", [SequenceClassifierReward, LocalJudge])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_models_are_read_by_shards(source: Any, dtype: str, tiny_policy: Path, tmp_path: Path) -> None:
    """Never whole before; then they are what they are whole, the head of a classifier in float32."""
    folder = tiny_classifier(tmp_path / "classifier") if source is SequenceClassifierReward else tiny_policy
    whole, by_shards = (source(str(folder), dtype=dtype) for _ in range(2))
    whole.setup(torch.device("cpu"))
    with (
        patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("whole")),
        without_weights() as made,
    ):
        by_shards.setup(torch.device("cpu"))
    assert made == {by_shards.model: (str(folder), None)}
    assert all(parameter.is_meta for parameter in by_shards.model.parameters())
    fill_shards(by_shards.model, *made[by_shards.model], torch.device("cpu"))
    for (name, expected), found in zip(whole.model.named_parameters(), by_shards.model.parameters(), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert not any(parameter.requires_grad for parameter in by_shards.model.parameters())
    tokens = torch.arange(1, 11)[None]
    assert torch.equal(by_shards.model(tokens).logits, whole.model(tokens).logits)


def test_offloaded_weights_come_back_without_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = [(tensor, tensor.data_ptr()) for tensor in [*model.parameters(), *model.buffers()]]
    elsewhere = patch.object(Tensor, "to", lambda data, *args, **options: data.clone())
    with elsewhere, pytest.raises(RuntimeError), on_device([model], torch.device("cpu")):
        assert all(tensor.data_ptr() != pointer for tensor, pointer in before)
        raise RuntimeError
    assert [tensor.data_ptr() for tensor, _ in before] == [pointer for _, pointer in before]
