"""One run, many strategies: the same text is sampled, and losses, gradient norms, weights and checkpoints agree."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gopo_lightning.distributed.decoder_layers import decoder_layers
from tests.ranks import Case, assert_same_run, assert_same_tensors, launch, on, read, run_case

RUNS = {
    "full": Case("full", export=True),
    "kl": Case("kl", kl_coef=0.1),
    "lora": Case("lora", lora=True, kl_coef=0.1, export=True),
    "epochs": Case("epochs", max_steps=4, module={"num_inner_epochs": 2, "prefix_sharing": "never"}),
}
STRATEGIES = ["ddp", "fsdp2"]
RESUMED = [("ddp", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp1"), ("fsdp2", "fsdp1")]
"""A strategy, and the one whose checkpoint it goes on from."""


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: on this process, then on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for case in [*RUNS.values(), Case("first", max_steps=2)]:
        run_case(case, tiny_policy, prompts_file, folder, 1)
    write_as_fsdp1(folder / "first.ckpt", folder / "fsdp1-first.ckpt")
    cases = [on(strategy, case) for strategy in STRATEGIES for case in RUNS.values()]
    # resumed by another strategy than the one that saved
    cases += [on(strategy, Case("first", max_steps=2)) for strategy in STRATEGIES]
    cases += [on(strategy, Case(f"after-{other}", resume=f"{other}-first.ckpt")) for strategy, other in RESUMED]
    # one rank is told to stop in the middle of a step, before a validation; all save, and the run goes on
    cases += [on(strategy, Case("stopped.1", stop=(1, 2))) for strategy in ("ddp", "fsdp2")]
    cases += [on(strategy, Case("stopped.2", resume="last")) for strategy in ("ddp", "fsdp2")]
    launch(cases, tiny_policy, prompts_file, folder, 2)
    return folder


def write_as_fsdp1(path: Path, to: Path) -> None:
    """The checkpoint at ``path``, of one process, in the form that FSDP1 gave it, which once trained policies here
    (Lightning's `fsdp`, and `fsdp_cpu`): whole tensors of the same names, the moments in another order, and of adapters
    with other numbers, since the frozen parameters were counted too.
    """
    checkpoint = torch.load(path)
    (optimizer,) = checkpoint["optimizer_states"]
    (group,) = optimizer["param_groups"]
    group["params"] = [3 * number + 2 for number in group["params"]]
    optimizer["state"] = {3 * number + 2: values for number, values in reversed(optimizer["state"].items())}
    torch.save(checkpoint, to)


@pytest.fixture(scope="module")
def three(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts a step on one process and on three."""
    folder = tmp_path_factory.mktemp("three")
    case = Case("full", prompts_per_step=6)
    run_case(case, tiny_policy, prompts_file, folder, 1)
    launch([on(strategy, case) for strategy in STRATEGIES], tiny_policy, prompts_file, folder, 3)
    return folder


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_like_one(strategy: str, run: str, results: Path) -> None:
    assert_same_run(results, f"{strategy}-{run}", run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_ranks_train_like_one(strategy: str, three: Path) -> None:
    assert_same_run(three, f"{strategy}-full", "full")


def test_the_runs_are_worth_comparing(results: Path) -> None:
    """Weights move, lengths differ; there is a group without scores and one that ties."""
    record, checkpoint = read(results, "full")
    assert all(step["metrics"]["train/grad_norm"] > 1e-2 for step in record["steps"])
    lengths = {len(text) for step in record["steps"] for texts in step["texts"].values() for text in texts}
    assert len(lengths) > 4
    assert any(step["metrics"]["reward/nan_fraction"] >= 0.25 for step in record["steps"])
    assert any(step["metrics"]["reward/all_tied_group_fraction"] > 0 for step in record["steps"])
    assert any(float(v["exp_avg"].abs().max()) > 1e-4 for v in checkpoint["optimizer_states"][0]["state"].values())


@pytest.mark.parametrize(("strategy", "other"), RESUMED)
def test_a_run_goes_on_under_another_strategy(strategy: str, other: str, results: Path) -> None:
    assert_same_run(results, f"{strategy}-after-{other}", f"{strategy}-full", 0 if strategy == other else 1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_bit_for_bit(strategy: str, results: Path) -> None:
    assert list((results / f"{strategy}-stopped").rglob("interrupted-step=2.ckpt"))
    assert_same_run(results, f"{strategy}-stopped.2", f"{strategy}-full", 0)
    assert read(results, f"{strategy}-stopped.2")[0]["validation"] == read(results, f"{strategy}-full")[0]["validation"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exports_hold_the_trained_weights(strategy: str, results: Path) -> None:
    trained = read(results, "full")[1]["state_dict"]
    exported = load_file(results / f"{strategy}-full-export" / "model.safetensors")
    assert_same_tensors(exported, {k.removeprefix("policy."): trained[f"policy.{k}"] for k in exported}, 1e-5)
    adapter = load_file(results / f"{strategy}-lora-export" / "adapter_model.safetensors")
    assert_same_tensors(adapter, load_file(results / "lora-export" / "adapter_model.safetensors"), 1e-5)


@pytest.mark.parametrize("strategy", ["", *(f"{strategy}-" for strategy in STRATEGIES)])
@pytest.mark.parametrize("run", ["kl", "lora"])
def test_a_checkpoint_is_policy_and_optimiser(strategy: str, run: str, results: Path) -> None:
    """Within one per cent and what the run's progress takes, with a reference loaded; of LoRA the adapter alone."""
    checkpoint = read(results, f"{strategy}{run}")[1]
    moments = checkpoint["optimizer_states"][0]["state"].values()
    tensors = [*checkpoint["state_dict"].values(), *(v for values in moments for v in values.values())]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parameters = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert num_bytes == pytest.approx(3 * 4 * parameters, rel=0.01)
    assert (results / f"{strategy}{run}.ckpt").stat().st_size < num_bytes * 1.01 + 60_000
    if run == "lora":
        assert all("lora_" in name for name in checkpoint["state_dict"])


def test_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.strategy: ddp"):
        decoder_layers(nn.Linear(2, 2))
