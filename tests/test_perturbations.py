"""ZO-RankSGD: weights by hand and against the ordinal advantage, what is sampled from what, training without loss."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gopo_lightning.distributed.strategies import FSDP2Strategy
from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.perturbations import net_preferences, preferences_of_rewards, rank_weights_of_noise
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionComparator
from gopo_lightning.rollout import RankFilter, RecordedEngine, TransformersEngine, VLLMEngine
from gopo_lightning.rollout.engines.perturbed import Noise, PerturbedEngine
from gopo_lightning.training.ranked_perturbation import RankedPerturbation
from gopo_lightning.types import Completions
from tests.ranks import LORA, Case, launch, read, run_case
from tests.rollouts import rollout_of
from tests.runs import make_data, make_module, make_trainer
from tests.test_module import Keep
from tests.test_resume import assert_identical

NAN = math.nan
XI = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
REWARDS = torch.tensor([2.0, 1.0, 0.0, 1.5])


def direction(top: int | None, authors_weights: bool = False, rewards: Tensor = REWARDS) -> list[float]:
    return (rank_weights_of_noise(rewards, top, authors_weights=authors_weights) @ XI).tolist()  # type: ignore[no-any-return]


def test_directions_by_hand() -> None:
    assert direction(None) == pytest.approx([-1 / 6, -7 / 12])
    assert direction(4) == pytest.approx([-1 / 6, -7 / 12])
    assert rank_weights_of_noise(REWARDS, 2).tolist() == pytest.approx([0.6, -0.4, -0.4, 0.2])
    assert direction(2) == pytest.approx([0.0, -0.7])
    assert direction(None, authors_weights=True) == pytest.approx([0.0, -1 / 6])


@pytest.mark.parametrize("seed", range(6))
def test_all_ranked_the_weights_are_the_ordinal_advantage(seed: int) -> None:
    """With ties and without scores, and of whatever grows with the reward."""
    generator = torch.Generator().manual_seed(seed)
    rewards_m = torch.randint(0, 5, (7,), generator=generator).double()
    rewards_m[seed % 3 * torch.arange(seed % 2)] = NAN
    num_valid = int((~rewards_m.isnan()).sum())
    weights_m = rank_weights_of_noise(rewards_m)
    torch.testing.assert_close(weights_m, ordinal(rewards_m[None])[0].double() / num_valid, rtol=1e-6, atol=1e-7)
    assert torch.equal(rank_weights_of_noise(rewards_m.exp()), weights_m)


@pytest.mark.parametrize("top", [1, 2, 3, 4, None])
@pytest.mark.parametrize("rewards", [[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 0.0], [1.0] * 4, [NAN, 2.0, NAN, 1.0]])
def test_the_weights_are_those_of_the_graph(rewards: list[float], top: int | None) -> None:
    """Of its edges, averaged over all orders of what ties; so they add up to 0."""
    valid = [i for i, r in enumerate(rewards) if r == r]
    k = min(top or len(valid), len(valid))
    expected, orders = torch.zeros(len(rewards), dtype=torch.float64), 0
    for shuffle in range(400):
        order = torch.randperm(len(valid), generator=torch.Generator().manual_seed(shuffle)).tolist()
        ranked = sorted((valid[i] for i in order), key=lambda i: -rewards[i])
        edges = [(ranked[a], ranked[b]) for a in range(k) for b in range(a + 1, len(ranked))]
        for better, worse in edges:
            expected[better] += 1 / len(edges)
            expected[worse] -= 1 / len(edges)
        orders += 1
    weights_m = rank_weights_of_noise(torch.tensor(rewards), top)
    torch.testing.assert_close(weights_m, expected / orders, rtol=0, atol=0.12)
    assert weights_m.sum().abs() < 1e-12
    if len(set(rewards)) == len(rewards):
        torch.testing.assert_close(weights_m, expected / orders, rtol=0, atol=1e-12)


def test_rankings_are_combined_by_borda() -> None:
    """Two prompts; the second says nothing of copy 0, and is a tie for the others."""
    preferences_PGG = preferences_of_rewards(torch.tensor([[2.0, 1.0, 0.0], [NAN, 5.0, 5.0]]))
    net_G, compared_G = net_preferences(preferences_PGG)
    assert net_G.tolist() == [2.0, 0.0, -2.0]
    assert compared_G.tolist() == [2.0, 3.0, 3.0]
    assert preferences_PGG[0, 0].tolist()[1:] == [1.0, 1.0] and preferences_PGG[1, 1, 2] == 0.5


def test_a_quadratic_descends_by_rankings_alone() -> None:
    """In 20 dimensions, of 10 copies a step."""
    point = nn.Linear(20, 1, bias=False)
    nn.init.ones_(point.weight)
    noise = Noise(seed=0)
    for noise.step in range(300):
        copies = [next(noise(point, i))[1] for i in range(10)]
        rewards_m = torch.stack([-((point.weight + 0.01 * xi) ** 2).sum() for xi in copies])
        for weight, xi in zip(rank_weights_of_noise(rewards_m).tolist(), copies, strict=True):
            point.weight.data.add_(0.1 * weight * xi)
    assert float((point.weight**2).sum()) < 2.0  # 20 at first


def test_noise_is_a_function_of_seed_step_and_number() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)

    def drawn(seed: int, step: int, number: int) -> Tensor:
        noise = Noise(seed)
        noise.step = step
        parts = list(noise(model, number))
        assert [parameter.shape for parameter, _ in parts] == [model[1].weight.shape, model[1].bias.shape]
        return torch.cat([xi.flatten() for _, xi in parts])

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    others = [drawn(1, 2, 3), drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 4), drawn(2, 1, 3)]
    assert len({tuple(xi.tolist()) for xi in others}) == 5


class Weighs(TransformersEngine):
    """Its completions say what the weights were, of what prompt and from which stream."""

    def generate(self, model: Any, tokenizer: Any, prompts: Any, num_completions: int, *args: Any, **named: Any) -> Any:
        assert num_completions == 1
        total = int(model.weight.detach().sum() * 1000)
        given = zip(prompts.prompts, named["seeds_N"], strict=True)
        texts = tuple(f"{prompt.index} {seed} {total}" for prompt, seed in given)
        self.calls = [*getattr(self, "calls", []), total]
        tokens_NT = torch.ones(len(texts), len(self.calls), dtype=torch.int64)
        return Completions(tokens_NT, tokens_NT.bool(), torch.zeros(len(texts), dtype=torch.bool), texts)


def test_each_completion_is_of_its_own_policy_and_the_weights_come_back() -> None:
    model, inner, noise = nn.Linear(5, 3, bias=False), Weighs(), Noise(7)
    before = model.weight.detach().clone()
    engine = PerturbedEngine(inner, noise, 0.5)
    prompts = rollout_of([[0.0], [0.0]], indices=[4, 9]).prompts
    sampling: Any = None
    found = engine.generate(model, None, prompts, 3, sampling, seeds_N=[*range(6)], eos_token_ids=[0])  # type: ignore[arg-type]
    expected = [int((before + 0.5 * next(noise(model, i))[1]).sum() * 1000) for i in range(3)]
    assert found.texts == tuple(f"{p} {n} {expected[n % 3]}" for n, p in enumerate([4, 4, 4, 9, 9, 9]))
    assert found.lengths_N.tolist() == [1, 2, 3, 1, 2, 3]
    assert torch.equal(model.weight, before) and len(set(expected)) == 3


# In training

RULE: dict[str, Any] = {"log_entropy": False, "micro_batch_tokens": None, "max_grad_norm": None}


def options(**more: Any) -> dict[str, Any]:
    return RULE | {"rule": RankedPerturbation(0.02, top=3), "num_completions": 5} | more


def test_only_the_adapter_moves_along_the_noise_of_its_step(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """By hand from the rewards that were logged, with plain SGD."""
    keep = Keep()
    policy = PolicyConfig(str(tiny_policy), lora=LORA)
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    module, before = (make_module(policy=policy, folder=tiny_policy, **options(), **sgd) for _ in range(2))
    torch.manual_seed(0)
    before.configure_model()
    torch.manual_seed(0)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[keep]).fit(module, make_data(prompts_file))
    net_G, compared_G = net_preferences(preferences_of_rewards(keep.experiences[0].rewards_PG))
    weights_m = rank_weights_of_noise(net_G / compared_G, 3)
    assert weights_m.abs().max() > 0.1
    for i, weight in enumerate(weights_m.tolist()):
        for parameter, xi in Noise(3)(before.policy, i):
            parameter.data.add_(0.5 * weight * xi)
    for (name, mine), theirs in zip(module.policy.named_parameters(), before.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)


def test_two_ranks_move_as_one_and_resume(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    def case(name: str, **more: Any) -> Case:
        return Case(name, lora=True, module=options(), max_steps=3, **more)

    run_case(case("one"), tiny_policy, prompts_file, tmp_path, 1)
    two = [case("two", strategy="ddp"), Case("parts.first", "ddp", True, module=options(), max_steps=1)]
    two += [case("parts.rest", strategy="ddp", resume="parts.first.ckpt")]
    launch(two, tiny_policy, prompts_file, tmp_path, 2)
    one, ddp, rest = (read(tmp_path, name) for name in ("one", "two", "parts.rest"))
    for mine, theirs in zip(ddp[0]["steps"], one[0]["steps"], strict=True):
        assert mine["texts"] == theirs["texts"]
        for tag in ("train/grad_norm", "train/tied_policies", "reward/mean"):
            assert mine["metrics"][tag] == pytest.approx(theirs["metrics"][tag], abs=1e-5)
    for name, tensor in one[1]["state_dict"].items():
        torch.testing.assert_close(ddp[1]["state_dict"][name], tensor, rtol=0, atol=1e-6)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(rest[1][key], ddp[1][key])
    assert any(step["metrics"]["train/grad_norm"] > 0.1 for step in one[0]["steps"])


def test_comparisons_are_enough(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    rewards = [FunctionComparator("tests.test_shaping.longer")]
    module = make_module(tiny_policy, **options(rewards=rewards))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, make_data(prompts_file))
    assert trainer.callback_metrics["train/grad_norm"] > 0.1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"num_inner_epochs": 2},
            "update.num_inner_epochs=2 has no effect: update.rule RankedPerturbation reads no loss",
        ),
        ({"micro_batch_tokens": 60}, "update.micro_batch_tokens=60 has no effect"),
        ({"advantage": "rloo"}, "objective.advantage=rloo has no effect"),
        ({"transforms": [RankFilter("bw", 2)]}, r"\['RankFilter'\], which change advantages"),
        ({"engine": RecordedEngine()}, "which RecordedEngine does not do"),
    ],
)
def test_what_it_would_pass_over_is_refused(more: dict[str, Any], message: str, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_policy, **options(**more))


@pytest.mark.parametrize(("given", "message"), [({"scale": 0.0}, "scale=0.0"), ({"top": 0}, "top=0")])
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankedPerturbation(**given)


def test_where_weights_cannot_be_moved_it_is_refused() -> None:
    rule = RankedPerturbation()
    sharding: Any = SimpleNamespace(strategy=FSDP2Strategy())
    with pytest.raises(ValueError, match="moves whole weights in place, and trainer.strategy: fsdp2 shards them"):
        rule.check(sharding)
    with pytest.raises(ValueError, match="which VLLMEngine does not do"):
        rule.engine(object.__new__(VLLMEngine))
