"""What goes wrong on one of two ranks ends both at once; what was interrupted goes on; checkpoints hold no more than
they must.
"""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionComparator, FunctionReward, RewardSource, SequenceClassifierReward
from gopo_lightning.rollout import TransformersEngine
from gopo_lightning.types import Completions
from tests.conftest import byte_tokenizer
from tests.ranks import Case, launch, run_case
from tests.test_resume import assert_identical

STRATEGIES = ["ddp", "fsdp2"]


def on_rank_1() -> bool:
    return os.environ["RANK"] == "1"


def raises(completions: list[str]) -> list[float]:
    """The server that rank 1 asks is gone."""
    if on_rank_1():
        raise ConnectionError("the reward server is gone")
    return [0.0] * len(completions)


def hangs(completions: list[str]) -> list[float]:
    """The server that rank 1 asks does not answer."""
    if on_rank_1():
        time.sleep(600)
    return [0.0] * len(completions)


def stuck_judge(first: list[str], second: list[str]) -> list[float]:
    """In a validation, where completions are compared with the reference's."""
    if on_rank_1():
        raise ConnectionError("the judge is gone")
    return [0.5] * len(first)


class WrongKey(RewardSource):
    """A source that cannot be set up on rank 1."""

    name = "keyed"

    def setup(self, device: torch.device) -> None:
        if on_rank_1():
            raise ValueError("the key is refused")

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        return [0.0] * len(completions)


class BrokenEngine:
    """Runs out of memory on rank 1."""

    def generate(self, *arguments: Any, **options: Any) -> Completions:
        if on_rank_1():
            raise MemoryError("no room for the keys and values")
        return TransformersEngine().generate(*arguments, **options)


class SmallDevice(FunctionReward):
    """A source whose model cannot be moved to the device of rank 1."""

    def models(self) -> list[torch.nn.Module]:
        if on_rank_1():
            raise MemoryError("no room for the reward model")
        return []


def breaks(rewards: torch.Tensor) -> torch.Tensor:
    """An advantage or a combination of the user's own."""
    if on_rank_1() and rewards.shape[0] > 1:  # not when it is tried on one group at the start
        raise ArithmeticError("no rank fits")
    return rewards[..., 0] if rewards.dim() == 3 else rewards


def infinite(completions: list[str]) -> list[float]:
    """No magnitude, on rank 1 alone."""
    return [float("inf") if on_rank_1() else float(len(c)) for c in completions]


FAILURES: dict[str, dict[str, Any]] = {
    "engine": {"engine": BrokenEngine()},
    "placing": {"rewards": [SmallDevice("tests.runs.count_vowels", name="small")]},
    "combine": {"combine": f"{__name__}.breaks"},
    "advantage": {"advantage": f"{__name__}.breaks"},
    "raises": {"rewards": [FunctionReward(raises)]},
    "hangs": {"rewards": [FunctionReward(hangs)], "timeout_seconds": 2.0},
    "judge": {"rewards": [FunctionComparator(stuck_judge)]},
    "set-up": {"rewards": [WrongKey()]},
    "infinite": {"rewards": [FunctionReward(infinite)], "advantage": "batch"},
}
EPOCHS = {"num_inner_epochs": 2, "num_minibatches": 2, "prefix_sharing": "never"}


def sized_case(strategy: str, name: str, folder: Path, **changes: Any) -> Case:
    """One step of a policy of 12 MB with its optimiser, a reference and a reward model beside it."""
    module = {
        "policy": PolicyConfig(str(folder / "policy")),
        "rewards": [SequenceClassifierReward(str(folder / "reward_model"))],
        "loss": ClippedSurrogate(kl_coef=0.1),
    }
    return Case(f"{strategy}-{name}", strategy, max_steps=1, module=module | changes)


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: on this process, then on two ranks."""
    folder = tmp_path_factory.mktemp("failures")
    save_models(folder)
    lora = PolicyConfig(str(folder / "policy"), lora={"r": 64, "target_modules": "all-linear"})
    run_case(Case("epochs", max_steps=12, module=EPOCHS), tiny_policy, prompts_file, folder, 1)
    run_case(Case("stopped.1", stop=(0, 5), max_steps=12, module=EPOCHS), tiny_policy, prompts_file, folder, 1)
    run_case(Case("stopped.2", resume="last", max_steps=12, module=EPOCHS), tiny_policy, prompts_file, folder, 1)
    run_case(sized_case("auto", "full", folder), tiny_policy, prompts_file, folder, 1)
    run_case(sized_case("auto", "lora", folder, policy=lora), tiny_policy, prompts_file, folder, 1)
    cases = [Case(f"fails-{name}", "ddp", fails=True, module=module) for name, module in FAILURES.items()]
    cases += [
        Case("ddp-epochs", "ddp", max_steps=12, module=EPOCHS),
        Case("ddp-stopped.1", "ddp", stop=(1, 5), max_steps=12, module=EPOCHS),
        Case("ddp-stopped.2", "ddp", resume="last", max_steps=12, module=EPOCHS),
    ]
    cases += [sized_case(strategy, "full", folder) for strategy in STRATEGIES]
    cases += [sized_case(strategy, "lora", folder, policy=lora) for strategy in STRATEGIES]
    launch(cases, tiny_policy, prompts_file, folder, 2)
    return folder


def save_models(folder: Path) -> None:
    """A policy of a million weights and a reward model as large, so that one per cent is more than the rest."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward_model", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        (
            "raises",
            "RuntimeError .*'raises' raised ConnectionError: the reward server is gone",
            "reward source 'raises'",
        ),
        ("hangs", "TimeoutError .*'hangs' has not answered within rewards.timeout_seconds=2", "reward source 'hangs'"),
        (
            "judge",
            "RuntimeError .*'stuck_judge' raised ConnectionError: the judge is gone",
            "reward source 'stuck_judge'",
        ),
        ("set-up", "ValueError .*the key is refused", "the set-up of reward source 'keyed'"),
        ("engine", "MemoryError .*no room for the keys and values", "sampling"),
        ("placing", "MemoryError .*no room for the reward model", "placing the reward models"),
        ("combine", "ArithmeticError .*no rank fits", "combining the rewards"),
        ("advantage", "ArithmeticError .*no rank fits", "the advantage"),
    ],
)
def test_an_error_on_one_rank_ends_all_and_is_said_on_all(name: str, own: str, others: str, results: Path) -> None:
    peer, failed = ((results / f"fails-{name}.rank{rank}.txt").read_text() for rank in (0, 1))
    assert re.match(own, failed, re.DOTALL)
    assert peer.startswith("PeerError") and f"rank 1 failed in {others}" in peer
    assert re.search(own.partition(".*")[2], peer, re.DOTALL)  # the same reason
    assert all(float(re.search(r"after ([\d.]+) s", text)[1]) < 30 for text in (peer, failed))  # type: ignore[index]


def test_an_infinite_reward_of_one_rank_has_no_average_on_any(results: Path) -> None:
    peer, failed = ((results / f"fails-infinite.rank{rank}.txt").read_text() for rank in (0, 1))
    assert failed.startswith("ValueError") and "hold an infinity, which has no magnitude to average. Use" in failed
    assert peer.startswith("ValueError") and "the rewards of another rank hold an infinity" in peer


@pytest.mark.parametrize("ranks", ["", "ddp-"])
def test_a_run_with_inner_epochs_goes_on_bit_for_bit(ranks: str, results: Path) -> None:
    """Stopped in mid-epoch of the data, with four updates a rollout: the rollout is finished, then saved."""
    assert list((results / f"{ranks}stopped").rglob("interrupted-step=8.ckpt"))
    rest, whole = (torch.load(results / f"{ranks}{name}.pt") for name in ("stopped.2", "epochs"))
    assert len(whole["steps"]) == 3 and len(rest["steps"]) == 1
    assert rest["steps"][0]["texts"] == whole["steps"][2]["texts"]
    assert rest["validation"] == whole["validation"]
    rest, whole = (torch.load(results / f"{ranks}{name}.ckpt") for name in ("stopped.2", "epochs"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_identical(rest[key], whole[key])


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_is_policy_and_optimiser(strategy: str, kind: str, results: Path) -> None:
    """Plus at most one per cent, with a reference and a reward model loaded; of LoRA the adapter alone."""
    path = results / f"{strategy}-{kind}.ckpt"
    checkpoint = torch.load(path)
    num_bytes = 3 * sum(tensor.numel() * 4 for tensor in checkpoint["state_dict"].values())  # weights, two moments
    assert num_bytes > 9e6
    assert num_bytes <= path.stat().st_size <= 1.01 * num_bytes, path.stat().st_size / num_bytes
    assert all(name.startswith("policy.") for name in checkpoint["state_dict"])
    assert all("lora_" in name for name in checkpoint["state_dict"]) is (kind == "lora")
