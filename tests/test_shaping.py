"""Shaping: what a transform and a credit may give, when they act, through a kill, and together."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.objectives.credit import reward_to_go
from gopo_lightning.rewards import FunctionComparator
from gopo_lightning.rollout.shaping import Shaping
from gopo_lightning.rollout.transforms import Context, KLInReward, RankFilter, Transform
from gopo_lightning.types import Experience, Rollout
from tests.rollouts import rollout_of
from tests.runs import make_data, make_module, make_trainer, weights
from tests.test_credit import by_a_loop
from tests.test_module import fit
from tests.test_resume import Curves, Die, Killed, assert_identical, train
from tests.test_transforms import Before, plain_logprobs

NAN = float("nan")
NOW = Context(0, 0)


class Gives(Transform):
    """What a function makes of the rollout."""

    def __init__(self, change: Callable[[Any], Any], position: str = "rewards") -> None:
        self._change = change
        self.position = position  # type: ignore[misc,assignment]

    def __call__(self, rollout: Any, context: Context) -> Any:
        return self._change(rollout)


def given(position: str = "rewards", **fields: Any) -> Gives:
    """Replaces ``fields``."""
    return Gives(lambda rollout: replace(rollout, **fields), position)


class Moody(Transform):
    """Likes long completions in every third rollout: what it does follows from what it has seen."""

    def __init__(self) -> None:
        self._seen = 0

    def __call__(self, rollout: Rollout, context: Context) -> Rollout:  # type: ignore[override]
        lengths_PG = rollout.completions.lengths_N.view_as(rollout.rewards_PG)
        return replace(rollout, rewards_PG=rollout.rewards_PG + (self._seen % 3 == 2) * lengths_PG)

    def commit(self, experience: Experience) -> None:
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = state["seen"]


# --- one call ---------------------------------------------------------------------------------------------------------


def test_transforms_go_in_order_on_their_side_of_the_advantage() -> None:
    """Rewards (1, 2) are doubled and then lowered, and what is ranked is (2 − 5, 4 − 1)."""
    shaping = Shaping(
        lambda rewards_PG: rewards_PG * 10,
        transforms=[
            Gives(lambda e: replace(e, advantages_PG=e.advantages_PG + 1), "advantages"),
            Gives(lambda r: replace(r, rewards_PG=r.rewards_PG * 2)),
            Gives(lambda r: replace(r, rewards_PG=r.rewards_PG - torch.tensor([[5.0, 1.0]]))),
        ],
    )
    rollout = rollout_of([[1.0, 2.0]])
    experience = shaping(rollout, NOW)
    assert experience.rewards_PG.tolist() == [[-3.0, 3.0]]
    assert experience.advantages_PG.tolist() == [[-29.0, 31.0]] and experience.advantages_PG.dtype == torch.float32
    assert rollout.rewards_PG.tolist() == [[1.0, 2.0]]
    assert experience.advantages_NT is None


def test_the_credit_reads_what_transforms_gave() -> None:
    earned_NT = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    shaping = Shaping(ordinal, transforms=[given(token_rewards_NT=earned_NT)], credit=reward_to_go)
    experience = shaping(rollout_of([[2.0, 1.0]], [2, 2]), NOW)
    assert experience.advantages_NT is not None
    assert experience.advantages_NT.tolist() == [[2.5, 2.0], [-2.5, -2.0]]


def test_needs_add_up() -> None:
    assert Shaping(ordinal).needs == frozenset()
    assert Shaping(ordinal, transforms=[RankFilter("br", 1), KLInReward(0.1)]).needs == {"old", "reference"}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Gives(lambda rollout: None), "Gives returned NoneType; it must return the Rollout that it got"),
        (Gives(lambda rollout: rollout.rewards_PG), r"returned torch.float64 \(2, 2\)"),
        (Gives(lambda r: r.with_advantages(r.rewards_PG)), "returned Experience; it must return the Rollout"),
        (Gives(lambda e: Rollout(**{f.name: getattr(e, f.name) for f in fields(Rollout)}), "advantages"), "Rollout"),
        (Gives(lambda r: r.select(torch.tensor([0, 1]))), "changed prompts or completions.*weight of 0"),
        (given(rewards_PG=torch.zeros(4)), r"gave rewards_PG=torch.float32 \(4,\); it must be a float tensor \(2, 2\)"),
        (given(rewards_PG=None), "gave rewards_PG=NoneType"),
        (given(rewards_PG=[[1.0, 2.0]] * 2), "gave rewards_PG=list"),
        (given(weights_PG=torch.ones(2, 3)), r"gave weights_PG=torch.float32 \(2, 3\)"),
        (given(weights_PG=torch.ones(2, 2).bool()), r"gave weights_PG=torch.bool \(2, 2\); it must be a float"),
        (given(weights_PG=torch.tensor([[1.0, -0.5], [1, 1]])), r"gave weights_PG=\[\[1.0, -0.5\].*at least 0"),
        (given(weights_PG=torch.tensor([[1.0, NAN], [1, 1]])), "weights must be finite"),
        (given(weights_PG=torch.tensor([[1.0, float("inf")], [1, 1]])), "weights must be finite"),
        (given(token_rewards_NT=torch.ones(4, 2)), r"token_rewards_NT=torch.float32 \(4, 2\).* \(4, 3\)"),
        (given("advantages", advantages_PG=torch.ones(4)), r"advantages_PG=torch.float32 \(4,\)"),
        (given("advantages", advantages_NT=torch.ones(4, 3)), "gave advantages to tokens, which the credit would"),
        (given(token_rewards_NT=torch.ones(4, 3)), "credit=broadcast does not read them. Use credit: reward_to_go"),
    ],
)
def test_what_a_transform_may_not_give_is_refused(transform: Transform, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shaping(ordinal, transforms=[transform])(rollout_of([[2.0, 1.0], [1.0, 2.0]], [3, 1, 2, 2]), NOW)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (lambda e: torch.ones(4), r"the credit returned torch.float32 \(4,\); it must return a float tensor \(4, 3\)"),
        (lambda e: e.advantages_PG, r"returned torch.float32 \(2, 2\)"),
        (lambda e: torch.ones(4, 3).long(), r"returned torch.int64 \(4, 3\)"),
        (lambda e: 1.0, "returned float"),
    ],
)
def test_what_a_credit_may_not_give_is_refused(credit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shaping(ordinal, credit=credit)(rollout_of([[2.0, 1.0], [1.0, 2.0]], [3, 1, 2, 2]), NOW)


def test_a_transform_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="position='reward' of Gives is unknown, so it would never be applied"):
        Shaping(ordinal, transforms=[given("reward")])


def test_a_sole_pairwise_source_is_ranked_by_comparisons_alone(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """So what changes rewards would change nothing; what changes weights or tokens does."""
    options: dict[str, Any] = {"rewards": [FunctionComparator("tests.test_shaping.longer")]}
    module = make_module(tiny_policy, transforms=[KLInReward(0.1)], **options)
    with pytest.raises(ValueError, match="a pairwise one, reads its comparisons and no reward. Add a second source"):
        fit(module, prompts_file, tmp_path, max_steps=1, limit_val_batches=0)
    filtered = make_module(
        tiny_policy,
        transforms=[KLInReward(0.1, per="token"), RankFilter("bw", 2)],
        credit="reward_to_go",
        **options,
    )
    (experience,) = fit(filtered, prompts_file, tmp_path, max_steps=1, limit_val_batches=0).experiences
    assert set(experience.weights_PG.sum(1).tolist()) <= {0.0, 2.0} and experience.weights_PG.any()


def longer(first: list[str], second: list[str]) -> list[float]:
    """Whether the first is longer; ½ for a tie."""
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


# --- runs of one process ----------------------------------------------------------------------------------------------


def test_transforms_do_not_act_in_evaluation(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """At step 0 the policy is its own reference; later the curves are those of the rewards as they are."""
    module = make_module(tiny_policy, transforms=[KLInReward(0.3), Moody()])
    curves = Curves()
    trainer = make_trainer(tmp_path, callbacks=[curves], max_steps=1, val_check_interval=1)
    trainer.fit(module, make_data(prompts_file))
    assert curves.values[0]["val/win_rate"] == 0.5 and set(curves.values) == {0, 1}
    assert all(values["val/reward"] == values["val/vowels/reward"] for values in curves.values.values())
    assert module.shaping.state_dict()["1 Moody"] == {"seen": 1}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_killed_run_ends_like_one_that_was_not(
    step: int, tiny_policy: Path, prompts_file: Path, tmp_path: Path, whole_run: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, tiny_policy, prompts_file, Die("on_train_batch_start", step), **stateful())
    rest = train(tmp_path, tiny_policy, prompts_file, **stateful())
    for key in ("state_dict", "optimizer_states"):
        assert_identical(rest["checkpoint"][key], whole_run["checkpoint"][key])
    assert rest["checkpoint"]["callbacks"]["RolloutCallback"]["transforms"]["0 Moody"] == {"seen": 5}


@pytest.fixture(scope="module")
def whole_run(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted."""
    return train(tmp_path_factory.mktemp("whole"), tiny_policy, prompts_file, **stateful())


def stateful() -> dict[str, Any]:
    return {"transforms": [Moody(), KLInReward(0.1), RankFilter("br", 2)]}


def test_reward_to_go_by_the_formula(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The second step's change of weights under SGD with lr 1, with the mean over tokens and then completions."""
    module = make_module(
        tiny_policy,
        transforms=[KLInReward(0.3, per="token")],
        credit={"function": "reward_to_go", "init_args": {"gamma": 0.9}},
        loss=ClippedSurrogate(aggregation="sequence"),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        prefix_sharing="never",
        micro_batch_tokens=60,
        num_completions=3,
    )
    made = Before()
    make_trainer(tmp_path, callbacks=[made], limit_val_batches=0).fit(module, make_data(prompts_file))
    experience, policy = made.experiences[1], made.policies[1]
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy)
    logprobs_NT = plain_logprobs(policy, experience)
    kl_NT = (logprobs_NT - plain_logprobs(reference, experience)).detach()
    assert kl_NT.abs().max() > 0.05
    advantages_NT = by_a_loop(replace(experience, token_rewards_NT=-0.3 * kl_NT), 0.9)
    length_N = experience.completions.lengths_N
    loss = -((logprobs_NT * advantages_NT).sum(-1) / length_N).sum() / len(length_N)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    torch.testing.assert_close(weights(module), before - gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("micro_batch_tokens", [40, 90])
def test_a_filter_does_not_depend_on_micro_batches(
    micro_batch_tokens: int, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """With minibatches and without completions that were cut off."""

    def updated(budget: int | None) -> Tensor:
        module = make_module(tiny_policy, **filtered() | {"micro_batch_tokens": budget})
        keep = fit(module, prompts_file, tmp_path, max_steps=4, limit_val_batches=0)
        for experience in keep.experiences:
            kept_P = experience.weights_PG.sum(1)
            tied_P = experience.advantages_PG.eq(0).all(1)
            assert torch.equal(kept_P, torch.where(tied_P, 0.0, 2.0))
        assert any(experience.completions.truncated_N.any() for experience in keep.experiences)
        return keep.weights[-1]

    torch.testing.assert_close(updated(micro_batch_tokens), updated(None), rtol=0, atol=1e-6)


def filtered() -> dict[str, Any]:
    sampling = replace(make_module(Path()).sampling, max_new_tokens=8)
    return {
        "transforms": [RankFilter("br", 2)],
        "num_minibatches": 2,
        "loss": ClippedSurrogate(mask_truncated=True),
        "sampling": sampling,
    }
