"""Transforms: the rank filter's draws, and the KL penalty against plain forwards of policy and reference."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rollout.transforms import Context, KLInReward, RankFilter, rank_weights
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.types import Experience, Rollout
from tests.ranks import LORA
from tests.rollouts import experience_of, rollout_of
from tests.runs import make_data, make_module, make_trainer

NAN = math.nan


def kept(filter_: RankFilter, rewards: list[list[float]], step: int = 0, seed: int = 0, **fields: Any) -> Tensor:
    """weights_PG."""
    weights_PG = filter_(experience_of(rewards, **fields), Context(seed, step)).weights_PG
    assert weights_PG is not None and weights_PG.dtype == torch.float32
    return weights_PG


# --- RankFilter -------------------------------------------------------------------------------------------------------


def test_rank_weights_by_hand() -> None:
    assert rank_weights("br", 5).tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]
    assert rank_weights("bw", 4).tolist() == [0.5, 0.0, 0.0, 0.5]
    assert rank_weights("bon", 3).tolist() == [1.0, 0.0, 0.0]
    assert rank_weights([0.5, 0.25, 0.25], 2).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("weights", "keep", "rewards", "expected"),
    [
        ("bw", 2, [2.0, 5.0, 1.0, 3.0], [0, 1, 1, 0]),
        ("bw", 3, [2.0, 5.0, 1.0, 3.0], [0, 1, 1, 0]),  # two have a weight
        ("bon", 2, [2.0, 5.0, 1.0, 3.0], [0, 1, 0, 0]),
        ("bw", 2, [NAN, 5.0, 1.0, 3.0], [0, 1, 1, 0]),
        ("br", 4, [NAN, 5.0, 1.0, 3.0], [0, 1, 1, 1]),
        ([0.0, 0.0, 1.0, 1.0], 2, [2.0, 5.0, 1.0, 3.0], [1, 0, 1, 0]),
        ([0.0, 0.0, 1.0, 1.0], 2, [NAN, 5.0, 1.0, NAN], [0, 0, 0, 0]),  # only ranks 1 and 2 are there
        ([0.25] * 4, 4, [2.0, 5.0, 1.0, 2.0], [1, 1, 1, 1]),  # the identity
        ("br", 4, [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]),
        ("br", 4, [1.0, NAN, NAN, 1.0], [0, 0, 0, 0]),
        ("br", 4, [NAN, NAN, 1.0, NAN], [0, 0, 0, 0]),
        ("br", 4, [NAN] * 4, [0, 0, 0, 0]),
    ],
)
def test_what_is_certain_is_kept(weights: Any, keep: int, rewards: list[float], expected: list[float]) -> None:
    assert kept(RankFilter(weights, keep), [rewards]).tolist() == [expected]


@pytest.mark.parametrize("weights", ["bon", "br", "bw", [0.4, 0.3, 0.2, 0.1, 0.0]])
def test_one_of_them_is_drawn_with_its_rank_s_probability(weights: Any) -> None:
    """Σ w A over 4,000 groups, within four standard errors of Σ p A; and each rank's share likewise."""
    P, rewards_G = 4000, [2.0, 5.0, 1.0, 3.0, -1.0]
    weights_PG = kept(RankFilter(weights, 1), [rewards_G] * P)
    p_G = rank_weights(weights, 5)[torch.tensor([2, 0, 3, 1, 4])]
    assert weights_PG.sum(1).eq(1).all()
    error_G = (p_G * (1 - p_G) / P).sqrt()
    assert ((weights_PG.double().mean(0) - p_G).abs() <= 4 * error_G).all()
    advantages_G = ordinal(torch.tensor([rewards_G])).double()[0]
    mean = (p_G * advantages_G).sum()
    error = ((p_G * (advantages_G - mean) ** 2).sum() / P).sqrt()
    assert abs((weights_PG * advantages_G).sum(1).mean() - mean) <= 4 * error + 1e-12


def test_two_are_drawn_without_replacement() -> None:
    """BR of 3 (½, ¼, ¼): the best is among two with ½ + 2 · ¼ · ½ / ¾ = 5/6; over 4,000 groups, four errors."""
    weights_PG = kept(RankFilter("br", 2), [[1.0, 3.0, 2.0]] * 4000)
    assert weights_PG.sum(1).eq(2).all()
    share, error = weights_PG[:, 1].double().mean(), math.sqrt(5 / 36 / 4000)
    assert abs(share - 5 / 6) <= 4 * error


def test_ties_are_broken_by_the_stream_and_not_by_position() -> None:
    """Of three that are best, each is the best as often: 1/3 of 3,000 groups, within four errors."""
    weights_PG = kept(RankFilter("bon", 1), [[1.0, 5.0, 5.0, 5.0]] * 3000)
    share_G = weights_PG.double().mean(0)
    assert share_G[0] == 0
    assert ((share_G[1:] - 1 / 3).abs() <= 4 * math.sqrt(2 / 9 / 3000)).all()


def test_the_order_of_ties_says_nothing_about_the_draw() -> None:
    """BR of 3, two best: they have ½ and ¼ in either order, the third ¼; over 3,000 groups, within four errors."""
    share_G = kept(RankFilter("br", 1), [[5.0, 1.0, 5.0]] * 3000).double().mean(0)
    p_G = torch.tensor([3 / 8, 1 / 4, 3 / 8])
    assert ((share_G - p_G).abs() <= 4 * (p_G * (1 - p_G) / 3000).sqrt()).all()


def test_the_draw_is_keyed_by_the_prompt_and_not_by_its_place() -> None:
    """The same groups on any split over ranks and in any order; another step or seed draws anew."""
    rewards = torch.randint(0, 3, (60, 4), generator=torch.Generator().manual_seed(0)).double()
    filter_, rows = RankFilter("br", 2), list(range(60))
    whole = kept(filter_, rewards.tolist())
    for some in (rows[::2], rows[1::2], rows[::-1]):
        assert torch.equal(kept(filter_, rewards[some].tolist(), indices=some), whole[some])
    assert not torch.equal(kept(filter_, rewards.tolist(), step=1), whole)
    assert not torch.equal(kept(filter_, rewards.tolist(), seed=1), whole)
    assert torch.equal(kept(filter_, rewards.tolist()), whole)


def test_weights_from_before_are_kept_and_what_they_drop_is_not_ranked() -> None:
    before = torch.tensor([[0.0, 0.5, 2.0, 1.0]])
    assert kept(RankFilter("bw", 2), [[9.0, 5.0, 1.0, 3.0]], weights_PG=before).tolist() == [[0, 0.5, 2.0, 0]]


def test_the_filter_changes_weights_alone() -> None:
    experience = experience_of([[1.0, 2.0]], advantages=[[-1.0, 1.0]])
    filtered = RankFilter("bon", 1)(experience, Context(0, 0))
    changed = {name for name in vars(experience) if getattr(filtered, name) is not getattr(experience, name)}
    assert changed == {"weights_PG"} and isinstance(filtered, Experience)


@pytest.mark.parametrize(
    ("weights", "keep", "message"),
    [
        ("best", 1, "weights='best' of RankFilter is unknown; use bon, br, bw or a list"),
        ([0.0, 0.0], 1, "not all 0"),
        ([], 1, "not all 0"),
        ([1.0, -1.0], 1, "at least 0"),
        ([1.0, NAN], 1, "must be finite"),
        ("br", 0, "keep=0 of RankFilter must be at least 1"),
    ],
)
def test_options_of_the_filter_are_checked(weights: Any, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankFilter(weights, keep)


@pytest.mark.parametrize(("weights", "keep"), [("br", 3), ([0.5, 0.25, 0.25], 1)])
def test_the_filter_must_fit_the_group(weights: Any, keep: int) -> None:
    with pytest.raises(ValueError, match="for groups of 2 completions; give one weight a rank"):
        kept(RankFilter(weights, keep), [[1.0, 2.0]])


# --- KLInReward -------------------------------------------------------------------------------------------------------


def two_completions() -> Rollout:
    """Log-ratios (0.5, −0.25, 1) and (1), and garbage after the end of the second."""
    return rollout_of(
        [[3.0, NAN]],
        [3, 1],
        old_logprobs_NT=torch.tensor([[-1.0, -1.0, -1.0], [-1.0, NAN, 0.0]]),
        reference_logprobs_NT=torch.tensor([[-1.5, -0.75, -2.0], [-2.0, 7.0, -math.inf]]),
    )


def test_the_penalty_by_hand() -> None:
    rewards_PG = KLInReward(0.2)(two_completions(), Context(0, 0)).rewards_PG
    assert rewards_PG.dtype == torch.float64
    torch.testing.assert_close(rewards_PG, torch.tensor([[3 - 0.25, NAN]], dtype=torch.float64), equal_nan=True)


def test_the_penalty_of_each_token_by_hand() -> None:
    rollout = KLInReward(0.2, per="token")(two_completions(), Context(0, 0))
    expected_NT = torch.tensor([[-0.1, 0.05, -0.2], [-0.2, 0.0, 0.0]])
    torch.testing.assert_close(rollout.token_rewards_NT, expected_NT)
    torch.testing.assert_close(rollout.rewards_PG, two_completions().rewards_PG, rtol=0, atol=0, equal_nan=True)
    twice = KLInReward(0.1, per="token")(rollout, Context(0, 0))  # is added to what tokens have
    torch.testing.assert_close(twice.token_rewards_NT, 1.5 * expected_NT)


@pytest.mark.parametrize("coef", [0.0, -1.0, NAN, math.inf])
def test_a_penalty_is_above_zero(coef: float) -> None:
    with pytest.raises(ValueError, match=f"coef={coef} of KLInReward must be above 0 and finite"):
        KLInReward(coef)


def test_a_penalty_is_per_completion_or_token() -> None:
    with pytest.raises(ValueError, match="per='group' of KLInReward is unknown"):
        KLInReward(0.1, per="group")  # type: ignore[arg-type]


class Before(Callback):
    """What each training batch was made of: the experience, and a copy of the policy that made it."""

    def __init__(self) -> None:
        self.experiences: list[Experience] = []
        self.policies: list[nn.Module] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        policy = copy.deepcopy(pl_module.policy)
        self.policies.append(policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.experiences.append(batch["experience"])


def plain_logprobs(model: nn.Module, rollout: Rollout) -> Tensor:
    """One forward of transformers a completion, without padding; [N, T], 0 after its end."""
    logprobs_NT = torch.zeros(rollout.completions.mask_NT.shape)
    for n, mask_T in enumerate(rollout.completions.mask_NT):
        prompt = torch.tensor(rollout.prompts.prompts[n // rollout.group_size].token_ids)
        tokens = rollout.completions.tokens_NT[n, mask_T]
        logits = model.eval()(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs_NT[n, mask_T] = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return logprobs_NT


@pytest.mark.parametrize("per", ["completion", "token"])
@pytest.mark.parametrize("lora", [None, {key: LORA[key] for key in ("r", "target_modules")}])
def test_the_penalty_is_the_kl_of_plain_forwards(
    per: Any, lora: Any, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """In the second step, when the policy has left the reference; under LoRA that is the base."""
    module = make_module(
        tiny_policy,
        policy=PolicyConfig(str(tiny_policy), lora=lora),
        transforms=[KLInReward(0.3, per=per)],
        credit="reward_to_go" if per == "token" else "broadcast",
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3),
        micro_batch_tokens=60,
    )
    made = Before()
    make_trainer(tmp_path, callbacks=[made], limit_val_batches=0).fit(module, make_data(prompts_file))
    experience = made.experiences[1]
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        kl_NT = plain_logprobs(made.policies[1], experience) - plain_logprobs(reference, experience)
    assert kl_NT.abs().max() > 0.05
    raw_PG = experience.rewards_PGK[..., 0]
    if per == "token":
        torch.testing.assert_close(experience.token_rewards_NT, -0.3 * kl_NT, rtol=0, atol=1e-5)
        assert torch.equal(experience.rewards_PG, raw_PG)
    else:
        penalised_PG = raw_PG - 0.3 * kl_NT.sum(-1).view_as(raw_PG)
        torch.testing.assert_close(experience.rewards_PG, penalised_PG, rtol=0, atol=1e-5)
        torch.testing.assert_close(experience.advantages_PG, ordinal(experience.rewards_PG).float())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"num_minibatches": 2}, {"policy": 1}),
        ({"transforms": [KLInReward(0.1)]}, {"policy": 1, "reference": 1}),
        ({"transforms": [KLInReward(0.1)], "num_inner_epochs": 2}, {"policy": 1, "reference": 1}),
        (
            {"transforms": [KLInReward(0.1)], "loss": ClippedSurrogate(kl_coef=0.1), "log_reference_kl": True},
            {"policy": 1, "reference": 1},
        ),
        ({"loss": ClippedSurrogate(kl_coef=0.1), "num_minibatches": 2}, {"policy": 1, "reference": 1}),
    ],
)
def test_frozen_log_probs_are_computed_once_a_rollout(
    options: dict[str, Any],
    expected: dict[str, int],
    tiny_policy: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, calls, frozen = make_module(tiny_policy, **options), Counter[str](), PolicyForward.frozen

    def counted(self: PolicyForward, model: nn.Module, rollout: Rollout) -> Tensor:
        calls["policy" if model is module.policy else "reference"] += 1
        return frozen(self, model, rollout)

    monkeypatch.setattr(PolicyForward, "frozen", counted)
    steps = module.updates_per_batch
    make_trainer(tmp_path, max_steps=steps, limit_val_batches=0).fit(module, make_data(prompts_file))
    assert calls == expected
