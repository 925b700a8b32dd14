"""The iterate: which policy it is at which update, against copies kept by hand, and through a resume."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from gopo_lightning.distributed.checkpoints import last_checkpoint_of
from gopo_lightning.objectives.base import Loss
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.training.companions import Iterate
from gopo_lightning.types import Experience
from tests.ranks import LORA
from tests.runs import make_data, make_module, make_trainer
from tests.test_resume import Die, Killed, assert_identical, train
from tests.test_transforms import plain_logprobs

MIRROR = ClippedSurrogate(kl_coef=2.0, kl_anchor="iterate")
POLICIES = {"full": None, "lora": LORA}


class Seen(ClippedSurrogate):
    """Keeps what each update reads."""

    def __init__(self) -> None:
        super().__init__(kl_coef=2.0, kl_anchor="iterate")
        object.__setattr__(self, "updates", [])

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        self.updates.append((experience, logprobs_NT.detach()))  # type: ignore[attr-defined]
        return super().__call__(logprobs_NT, experience, mask_NT, total)


class Copies(Callback):
    """The policy before each rollout, by the number of updates."""

    def __init__(self) -> None:
        self.policies: dict[int, nn.Module] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        policy = copy.deepcopy(pl_module.policy)
        self.policies[trainer.global_step] = policy.merge_and_unload() if hasattr(policy, "peft_config") else policy


def updates_of(
    folder: Path, tiny_policy: Path, prompts_file: Path, every: int, max_steps: int, *, lora: Any = None
) -> tuple[list[Any], dict[int, nn.Module]]:
    """Two updates a rollout, from the last checkpoint on: what they read, and the policies before the rollouts."""
    loss, copies = Seen(), Copies()
    module = make_module(
        tiny_policy,
        policy=PolicyConfig(str(tiny_policy), lora=lora),
        loss=loss,
        iterate_every=every,
        num_inner_epochs=2,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
    )
    keeper = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(folder, callbacks=[copies, keeper], max_steps=max_steps, limit_val_batches=0)
    trainer.fit(module, make_data(prompts_file), ckpt_path=last_checkpoint_of(trainer))
    return loss.updates, copies.policies  # type: ignore[attr-defined]


def made_by(iterate_NT: Tensor, experience: Experience, policies: dict[int, nn.Module]) -> list[int]:
    """The updates after which a policy gives these log-probs, of those that are known."""
    with torch.no_grad():
        plain = {step: plain_logprobs(policy, experience) for step, policy in policies.items()}
    return [step for step, logprobs_NT in plain.items() if torch.allclose(logprobs_NT, iterate_NT, rtol=0, atol=1e-5)]


@pytest.mark.parametrize(
    ("every", "steps", "kind"),
    [(1, [0, 2, 4, 6], "full"), (3, [0, 0, 4, 6], "full"), (3, [0, 0, 4, 6], "lora"), (5, [0, 0, 0, 6], "full")],
)
def test_the_iterate_is_the_policy_of_some_updates_ago(
    every: int, steps: list[int], kind: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """The rollouts begin at 0, 2, 4 and 6 updates; both updates of one read the same copy."""
    updates, policies = updates_of(tmp_path, tiny_policy, prompts_file, every, 8, lora=POLICIES[kind])
    assert len(updates) == 8
    for i, (experience, logprobs_NT) in enumerate(updates):
        assert made_by(experience.iterate_logprobs_NT, experience, policies) == [steps[i // 2]]
        mine = torch.allclose(experience.iterate_logprobs_NT, logprobs_NT, rtol=0, atol=1e-6)
        assert mine is (i % 2 == 0 and steps[i // 2] == 2 * (i // 2))  # a KL of 0, until the first update


@pytest.mark.parametrize(("step", "kind"), [(1, "full"), (2, "full"), (3, "full"), (4, "full"), (3, "lora")])
def test_a_killed_run_ends_like_one_that_was_not(
    step: int, kind: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path, whole_runs: dict[str, dict[str, Any]]
) -> None:
    """Copies are taken before the updates 0, 2 and 4."""
    with pytest.raises(Killed):
        mirror_descent(tmp_path, tiny_policy, prompts_file, kind, Die("on_train_batch_start", step))
    rest, whole = mirror_descent(tmp_path, tiny_policy, prompts_file, kind), whole_runs[kind]
    assert rest["texts"] == whole["texts"][step:]
    for key in ("state_dict", "optimizer_states"):
        assert_identical(rest["checkpoint"][key], whole["checkpoint"][key])
    assert_identical(kept(rest["checkpoint"]), kept(whole["checkpoint"]))


def mirror_descent(
    folder: Path, tiny_policy: Path, prompts_file: Path, kind: str, *callbacks: Callback
) -> dict[str, Any]:
    """A run of five updates, from its last checkpoint on."""
    torch.manual_seed(0)  # of a new adapter
    policy = PolicyConfig(str(tiny_policy), lora=POLICIES[kind])
    return train(folder, tiny_policy, prompts_file, *callbacks, policy=policy, loss=MIRROR, iterate_every=2)


@pytest.fixture(scope="module")
def whole_runs(
    tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: mirror_descent(folder / kind, tiny_policy, prompts_file, kind) for kind in POLICIES}


def kept(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The iterate in a checkpoint."""
    found: dict[str, Any] = checkpoint["callbacks"]["RolloutCallback"]["iterate"]
    return found


@pytest.mark.parametrize("kind", POLICIES)
def test_a_checkpoint_keeps_what_is_trained(kind: str, whole_runs: dict[str, dict[str, Any]]) -> None:
    """Of LoRA the adapter alone; not the present weights, which are one update further."""
    checkpoint = whole_runs[kind]["checkpoint"]
    weights, iterate = checkpoint["state_dict"], kept(checkpoint)
    assert iterate["step"] == 4
    assert {f"policy.{name}" for name in iterate["weights"]} == set(weights)
    assert all("lora_" in name for name in iterate["weights"]) is (kind == "lora")
    assert any(not torch.equal(tensor, weights[f"policy.{name}"]) for name, tensor in iterate["weights"].items())


def test_another_interval_acts_from_the_resume_on(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy of the checkpoint is kept until the new interval asks for another."""
    with caplog.at_level(logging.INFO):
        _, before = updates_of(tmp_path, tiny_policy, prompts_file, 100, 4)
        updates, after = updates_of(tmp_path, tiny_policy, prompts_file, 6, 8)
    assert "objective.iterate_every 100 → 6" in caplog.text and "has no iterate" not in caplog.text
    experiences = [experience for experience, _ in updates[::2]]
    made = [made_by(e.iterate_logprobs_NT, e, before | after) for e in experiences]
    assert made == [[0], [6]]


def test_a_checkpoint_without_an_iterate_begins_one(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        with pytest.raises(Killed):
            train(tmp_path, tiny_policy, prompts_file, Die("on_train_batch_start", 3))
        assert "iterate" not in caplog.text
        rest = train(tmp_path, tiny_policy, prompts_file, loss=MIRROR, iterate_every=10)
    assert "The checkpoint has no iterate: it begins as the policy of step 3." in caplog.text
    assert kept(rest["checkpoint"])["step"] == 3


def test_an_iterate_that_nothing_reads_and_a_reader_without_one_are_refused(tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match="reads the iterate: set objective.iterate_every"):
        make_module(tiny_policy, loss=MIRROR)
    with pytest.raises(ValueError, match="objective.iterate_every=2, but nothing reads the iterate. Remove it"):
        make_module(tiny_policy, iterate_every=2)
    with pytest.raises(ValueError, match="iterate_every=0 must be at least 1; use null"):
        make_module(tiny_policy, loss=MIRROR, iterate_every=0)


def test_what_was_loaded_is_saved_again_before_the_first_rollout() -> None:
    policy = nn.Linear(2, 1)
    first, second = Iterate(4), Iterate(4)
    first.refresh(policy, 0)
    state = first.state_dict(keep=True)
    second.load_state_dict(state)
    assert_identical(second.state_dict(keep=True), state)
    assert Iterate(4).state_dict(keep=True) == {"step": -1, "weights": None}


def test_the_policy_is_itself_again_after_an_error() -> None:
    policy, iterate = nn.Linear(2, 1), Iterate(4)
    then = policy.weight.detach().clone()
    iterate.refresh(policy, 0)
    nn.init.ones_(policy.weight)
    with pytest.raises(RuntimeError), iterate.of(policy):
        assert torch.equal(policy.weight, then)
        raise RuntimeError
    assert policy.weight.eq(1).all()
