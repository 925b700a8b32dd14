"""The policy loss against loops written from the published formulas, finite differences and hand-worked numbers."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives import clipped as losses
from gopo_lightning.objectives import estimators
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.types import Completions, Experience, Prompt, PromptBatch

N, T = 4, 6
NAN = math.nan
AGGREGATIONS = ("token", "sequence", "constant")


def example(seed: int = 1, spread: float = 0.5) -> dict[str, Tensor]:
    """Float64 log-probs whose ratios leave the trust region on both sides; lengths 6, 3, 1, 4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs_NT = normal(N, T) - 2
    return {
        "logprobs_NT": logprobs_NT,
        "old_logprobs_NT": logprobs_NT + spread * normal(N, T),
        "reference_logprobs_NT": logprobs_NT + spread * normal(N, T),
        "advantages": torch.tensor([2.0, -2 / 3, 2 / 3, -2.0], dtype=torch.float64),
        "mask_NT": torch.arange(T) < torch.tensor([[6], [3], [1], [4]]),
    }


def one_group(
    mask_NT: Tensor,
    *,
    valid_N: Tensor | None = None,
    truncated_N: Tensor | None = None,
    max_new_tokens: int = T,
    **fields: Any,
) -> Experience:
    """A group of these completions, of which some may have no reward or be cut off."""
    num = len(mask_NT)
    truncated_N = torch.zeros(num, dtype=torch.bool) if truncated_N is None else truncated_N
    rewards_1N = torch.zeros(1, num) if valid_N is None else torch.where(valid_N, 0.0, NAN)[None]
    return Experience(
        PromptBatch.collate([Prompt(0, (1,), "")], 0),
        Completions(mask_NT.long(), mask_NT, truncated_N, ("",) * num),
        rewards_1N[..., None],
        rewards_1N,
        max_new_tokens,
        **{"advantages_PG": torch.zeros(1, num)} | fields,
    )


def whole(config: ClippedSurrogate, mask_NT: Tensor, max_new_tokens: int = T) -> Tensor:
    return config.denominator(one_group(mask_NT, max_new_tokens=max_new_tokens), mask_NT)


def loss_of(config: ClippedSurrogate, tensors: dict[str, Tensor], denominator: Tensor | None = None) -> Tensor:
    denominator = whole(config, tensors["mask_NT"]) if denominator is None else denominator
    return losses.policy_loss(**tensors, config=config, denominator=denominator)[0]


# Parity with the published formulas, as loops over Python floats


def reference_loss(kind: str, x: dict[str, Tensor], c: ClippedSurrogate, max_new_tokens: int) -> float:
    """The losses that TRL calls grpo, dapo, dr_grpo, and GSPO (grpo with sequence ratios), one token at a time."""
    per_completion: list[list[float]] = []
    for n in range(N):
        tokens = [t for t in range(T) if x["mask_NT"][n, t]]
        log_ratio = {t: (x["logprobs_NT"][n, t] - x["old_logprobs_NT"][n, t]).item() for t in tokens}
        sequence_ratio = math.exp(sum(log_ratio.values()) / len(tokens))
        A = x["advantages"][n].item()
        terms = []
        for t in tokens:
            r = sequence_ratio if kind == "gspo" else math.exp(log_ratio[t])
            clipped = min(max(r, 1 - c.clip_low), 1 + c.clip_high)
            capped = r if c.clip_ceiling is None else min(r, c.clip_ceiling)
            d = (x["reference_logprobs_NT"][n, t] - x["logprobs_NT"][n, t]).item()
            terms.append(-min(capped * A, clipped * A) + c.kl_coef * (math.exp(d) - d - 1))
        per_completion.append(terms)
    if kind == "dapo":
        return sum(map(sum, per_completion)) / sum(map(len, per_completion))
    if kind == "dr_grpo":
        return sum(map(sum, per_completion)) / (N * max_new_tokens)
    return sum(sum(terms) / len(terms) for terms in per_completion) / N


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("clip", [{}, {"clip_low": 0.1, "clip_high": 0.28, "clip_ceiling": 1.3, "kl_coef": 0.1}])
@pytest.mark.parametrize(
    ("kind", "aggregation", "ratio"),
    [
        ("grpo", "sequence", "token"),
        ("dapo", "token", "token"),
        ("dr_grpo", "constant", "token"),
        ("gspo", "sequence", "sequence"),
    ],
)
def test_equals_the_published_formulas(
    kind: str, aggregation: str, ratio: str, clip: dict[str, float], seed: int
) -> None:
    config = ClippedSurrogate(aggregation=aggregation, importance_sampling=ratio, **clip)
    x = example(seed)
    actual = loss_of(config, x, whole(config, x["mask_NT"], max_new_tokens=9))
    assert actual.item() == pytest.approx(reference_loss(kind, x, config, max_new_tokens=9), rel=1e-6)


def test_gspo_gradient_is_that_of_the_sequence_ratio() -> None:
    """GSPO eq. 5: without clipping the gradient at every token of n is -A_n s_n / (|y_n| N)."""
    config = ClippedSurrogate(aggregation="sequence", importance_sampling="sequence", clip_low=1.0, clip_high=1e6)
    x = example()
    x["logprobs_NT"].requires_grad_()
    loss_of(config, x).backward()
    log_ratio_NT = (x["logprobs_NT"] - x["old_logprobs_NT"]).detach() * x["mask_NT"]
    length_N = x["mask_NT"].sum(-1)
    s_N = torch.exp(log_ratio_NT.sum(-1) / length_N)
    expected = -(x["advantages"] * s_N / length_N / N).unsqueeze(-1) * x["mask_NT"]
    torch.testing.assert_close(x["logprobs_NT"].grad, expected, rtol=1e-6, atol=1e-9)


# Finite differences


@pytest.mark.parametrize(
    ("aggregation", "ratio", "estimator"),
    list(itertools.product(AGGREGATIONS, ("token", "sequence"), ("k3", "k2"))),
)
def test_gradient_equals_finite_differences(aggregation: str, ratio: str, estimator: str) -> None:
    config = ClippedSurrogate(
        aggregation=aggregation,
        importance_sampling=ratio,
        kl_estimator=estimator,
        kl_coef=0.3,
        clip_low=0.15,
        clip_high=0.25,
        clip_ceiling=1.4,
    )
    x = example(seed=3)

    def function(logprobs_NT: Tensor) -> Tensor:
        return loss_of(config, x | {"logprobs_NT": logprobs_NT})

    assert torch.autograd.gradcheck(function, (x["logprobs_NT"].requires_grad_(),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", ["uniform", "log", "poly", "loglog"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights_equal_finite_differences(weight: str, aggregation: str) -> None:
    config = ClippedSurrogate(aggregation=aggregation, token_weight=weight)
    x = example(seed=4)

    def function(logprobs_NT: Tensor) -> Tensor:
        return loss_of(config, x | {"logprobs_NT": logprobs_NT})

    assert torch.autograd.gradcheck(function, (x["logprobs_NT"].requires_grad_(),), eps=1e-6, atol=1e-6)


# Hand-worked values


def one_token(ratio: float, advantage: float, **options: Any) -> tuple[float, float, dict[str, float]]:
    """Loss, d loss / d log-prob, and metrics of a single token."""
    logprobs_NT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, metrics = losses.policy_loss(
        logprobs_NT,
        torch.zeros(1, 1, dtype=torch.float64),
        None,
        torch.tensor([advantage]),
        torch.ones(1, 1, dtype=torch.bool),
        config=ClippedSurrogate(**options),
        denominator=torch.tensor(1.0),
    )
    (gradient,) = torch.autograd.grad(loss, logprobs_NT)
    return loss.item(), gradient.item(), {k: v.item() for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, {}, -2.0, -2.0, None),
        (1.1, 2.0, {}, -2.2, -2.2, None),
        (1.5, 2.0, {}, -2.4, 0.0, "clip_high_fraction"),
        (1.5, -2.0, {}, 3.0, 3.0, None),
        (0.5, -2.0, {}, 1.6, 0.0, "clip_low_fraction"),
        (0.5, 2.0, {}, -1.0, -1.0, None),
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, -1.25, None),
        (0.75, -1.0, {"clip_low": 0.3}, 0.75, 0.75, None),
        (5.0, -1.0, {"clip_ceiling": 4.0}, 4.0, 0.0, "clip_ceiling_fraction"),
        (3.0, -1.0, {"clip_ceiling": 4.0}, 3.0, 3.0, None),
        (5.0, 1.0, {"clip_ceiling": 4.0}, -1.2, 0.0, "clip_high_fraction"),
    ],
)
def test_clipping_by_hand(
    ratio: float,
    advantage: float,
    options: dict[str, float],
    loss: float,
    gradient: float,
    clipped: str | None,
) -> None:
    actual_loss, actual_gradient, metrics = one_token(ratio, advantage, **options)
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    assert actual_gradient == pytest.approx(gradient, abs=1e-6)
    assert metrics.pop("ratio") == pytest.approx(ratio)
    assert {k for k, v in metrics.items() if v} == ({clipped} if clipped else set())


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize(
    ("advantage", "ceiling", "expected"),
    [
        (2.0, None, -2.4),  # the clip at 1.2 acts
        (0.0, None, 0.0),
        (-2.0, 3.0, 6.0),  # the ceiling acts
        (-2.0, None, math.inf),  # nothing bounds the loss; the run is stopped
    ],
)
def test_a_ratio_beyond_float32(kind: str, advantage: float, ceiling: float | None, expected: float) -> None:
    config = ClippedSurrogate(clip_ceiling=ceiling, importance_sampling=kind)
    logprobs_NT = torch.tensor([[-1.0]], requires_grad=True)
    loss, metrics = losses.policy_loss(
        logprobs_NT,
        torch.tensor([[-90.0]]),
        None,
        torch.tensor([advantage]),
        torch.ones(1, 1, dtype=torch.bool),
        config=config,
        denominator=torch.tensor(1.0),
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert logprobs_NT.grad.item() == 0
    assert metrics["ratio"].item() == math.inf


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_the_largest_ratios_of_float32_keep_their_gradient(kind: str) -> None:
    logprobs_NT = torch.tensor([[-1.0]], requires_grad=True)
    mask_NT = torch.ones(1, 1, dtype=torch.bool)
    ratio_NT = losses.importance_ratio(logprobs_NT, torch.tensor([[-89.5]]), mask_NT, kind)
    ratio_NT.sum().backward()
    assert ratio_NT.item() == torch.exp(torch.tensor(88.5)).item() == logprobs_NT.grad.item()


def test_denominators_by_hand() -> None:
    experience = one_group(
        torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool(),
        valid_N=torch.tensor([True, True, False, True]),
        truncated_N=torch.tensor([False, False, False, True]),
        max_new_tokens=10,
    )
    mask_NT = ClippedSurrogate(mask_truncated=True).mask(experience)
    assert mask_NT.tolist() == [[True] * 3, [True, True, False], [False] * 3, [False] * 3]
    counts = {kind: ClippedSurrogate(aggregation=kind).denominator(experience, mask_NT).item() for kind in AGGREGATIONS}
    assert counts == {"token": 5, "sequence": 2, "constant": 40}


def test_truncated_completions_stay_by_default() -> None:
    mask_NT, yes = torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, True])
    assert ClippedSurrogate().mask(one_group(mask_NT, truncated_N=yes)).all()


def test_on_policy_without_old_logprobs_is_reinforce() -> None:
    """The loss is -sum A / tokens, its gradient -A / tokens at every token, whatever the clip."""
    x = example()
    x["logprobs_NT"].requires_grad_()
    for kind in ("token", "sequence"):
        config = ClippedSurrogate(importance_sampling=kind, clip_low=0.0, clip_high=0.0)
        loss = loss_of(config, x | {"old_logprobs_NT": None})
        (gradient,) = torch.autograd.grad(loss, x["logprobs_NT"])
        expected = -x["advantages"].unsqueeze(-1) * x["mask_NT"] / 14
        assert loss.item() == pytest.approx(expected.sum().item())
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_token_weights_by_hand() -> None:
    weights = {kind: losses.token_weights(3, kind).tolist() for kind in ("uniform", "log", "poly", "loglog")}
    assert weights["uniform"] == [1, 1, 1]
    assert weights["log"] == pytest.approx([1 / math.log(2), 1 / math.log(3), 1 / math.log(4)])
    assert weights["poly"] == pytest.approx([1, 2**-0.5, 3**-0.5])
    assert weights["loglog"] == pytest.approx([1 / math.log(math.log(t)) for t in (6, 7, 8)])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_token_weights_multiply_the_advantage_of_each_token(ratio: str) -> None:
    x = example()
    x["logprobs_NT"].requires_grad_()
    gradients = {}
    for kind in ("uniform", "poly"):
        config = ClippedSurrogate(token_weight=kind, importance_sampling=ratio)
        (gradients[kind],) = torch.autograd.grad(loss_of(config, x), x["logprobs_NT"])
    expected = gradients["uniform"] * losses.token_weights(T, "poly")
    torch.testing.assert_close(gradients["poly"], expected)
    assert not torch.equal(gradients["poly"], gradients["uniform"])


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor(-1.0), torch.tensor(-1.5)
    assert losses.kl_k2(policy, reference).item() == pytest.approx(0.125)
    assert losses.kl_k3(policy, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_kl_estimators_average_to_the_exact_kl() -> None:
    """Over a whole vocabulary k3 has KL(policy, reference) as its mean, k2's gradient is the KL's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    mean_k3 = (policy.exp() * losses.kl_k3(policy, reference)).sum()
    torch.testing.assert_close(mean_k3, exact)
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    on_policy_k2 = (policy.exp().detach() * losses.kl_k2(policy, reference)).sum()
    (k2_gradient,) = torch.autograd.grad(on_policy_k2, logits, retain_graph=True)
    torch.testing.assert_close(k2_gradient, exact_gradient)


def test_metrics_are_sums_over_unmasked_tokens() -> None:
    x = example()
    _, metrics = losses.policy_loss(**x, config=ClippedSurrogate(), denominator=torch.tensor(1.0))
    ratio_NT = torch.exp(x["logprobs_NT"] - x["old_logprobs_NT"])
    low = (ratio_NT < 0.8) & (x["advantages"] < 0).unsqueeze(-1) & x["mask_NT"]
    high = (ratio_NT > 1.2) & (x["advantages"] > 0).unsqueeze(-1) & x["mask_NT"]
    assert low.any()
    assert high.any()
    assert metrics["clip_low_fraction"].item() == low.sum()
    assert metrics["clip_high_fraction"].item() == high.sum()
    assert metrics["ratio"].item() == pytest.approx(ratio_NT[x["mask_NT"]].sum().item())
    kl_NT = losses.kl_k3(x["logprobs_NT"], x["reference_logprobs_NT"])
    assert metrics["kl"].item() == pytest.approx(kl_NT[x["mask_NT"]].sum().item())
    assert set(metrics) == {"ratio", "clip_low_fraction", "clip_high_fraction", "kl"}
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in metrics.values())


# Masks, denominators, precision


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_masked_entries_reach_neither_loss_nor_gradient(aggregation: str, ratio: str) -> None:
    config = ClippedSurrogate(aggregation=aggregation, importance_sampling=ratio, kl_coef=0.1, clip_ceiling=3.0)
    clean = example()
    clean["mask_NT"][3] = False
    poisoned = dict(clean)
    for bad, name in zip(
        (NAN, -math.inf, math.inf), ("logprobs_NT", "old_logprobs_NT", "reference_logprobs_NT"), strict=True
    ):
        poisoned[name] = torch.where(clean["mask_NT"], clean[name], bad)
    poisoned["advantages"] = torch.tensor([2.0, -2 / 3, 2 / 3, NAN], dtype=torch.float64)
    gradients, results = [], []
    for x in (clean, poisoned):
        logprobs_NT = x["logprobs_NT"].clone().requires_grad_()
        denominator = whole(config, x["mask_NT"])
        loss, metrics = losses.policy_loss(**x | {"logprobs_NT": logprobs_NT}, config=config, denominator=denominator)
        gradients.append(torch.autograd.grad(loss, logprobs_NT)[0])
        results.append({"loss": loss.item()} | {k: v.item() for k, v in metrics.items()})
    assert results[0] == results[1]
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[1][~clean["mask_NT"]].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_mask_gives_zero_and_a_backward_pass(aggregation: str) -> None:
    x = example()
    x["mask_NT"][:] = False
    x["logprobs_NT"].requires_grad_()
    loss = loss_of(ClippedSurrogate(aggregation=aggregation), x)
    loss.backward()
    assert loss.item() == 0
    assert not x["logprobs_NT"].grad.any()


@pytest.mark.parametrize("split", [[4], [1, 1, 1, 1], [3, 1], [1, 3], [2, 2]])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_micro_batches(split: list[int], aggregation: str, ratio: str) -> None:
    """Each part is trimmed to its own longest completion, as the module does; a row is masked for NaN."""
    config = ClippedSurrogate(aggregation=aggregation, importance_sampling=ratio, kl_coef=0.2, token_weight="log")
    x = example()
    x["mask_NT"] = config.mask(one_group(x["mask_NT"], valid_N=torch.tensor([True, False, True, True])))
    parameter = torch.linspace(0.5, 1.5, T, dtype=torch.float64, requires_grad=True)

    def gradient(parts: list[int]) -> tuple[Tensor, float]:
        denominator = sum(whole(config, m, max_new_tokens=8) for m in x["mask_NT"].split(parts))
        parameter.grad, total, start = None, 0.0, 0
        for size in parts:
            rows = slice(start, start + size)
            width = max(int(x["mask_NT"][rows].sum(-1).max()), 1)
            part = {k: v[rows] if v.dim() == 1 else v[rows, :width] for k, v in x.items()}
            part["logprobs_NT"] = part["logprobs_NT"] * parameter[:width]
            loss = loss_of(config, part, denominator)
            loss.backward()
            total, start = total + loss.item(), start + size
        return parameter.grad.clone(), total

    torch.testing.assert_close(gradient(split), gradient([N]), rtol=1e-12, atol=1e-12)


def test_a_denominator_below_one_is_not_clamped() -> None:
    """One token over two ranks that average their gradients: the module passes 1 / 2."""
    x = example()
    once, twice = (loss_of(ClippedSurrogate(), x, torch.tensor(d)) for d in (1.0, 0.5))
    assert twice.item() == pytest.approx(2 * once.item())


def test_a_zero_advantage_stays_in_the_denominator() -> None:
    x = example()
    dropped = {k: v[:3] for k, v in x.items()}
    x["advantages"][3] = 0
    config = ClippedSurrogate()
    torch.testing.assert_close(loss_of(config, x), loss_of(config, dropped, whole(config, x["mask_NT"])))


def test_bfloat16_inputs_are_raised_to_float32() -> None:
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example().items()}
    raised = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    loss = loss_of(ClippedSurrogate(kl_coef=0.1), x)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(ClippedSurrogate(kl_coef=0.1), raised))


# Weights of completions


def objective_loss(
    config: ClippedSurrogate, x: dict[str, Tensor], total: Tensor | None = None, **fields: Any
) -> tuple[float, Tensor]:
    """Loss and gradient by way of `Objective`, of one group with ``fields``; ``total``: of a whole it is a part of."""
    names = ("old_logprobs_NT", "reference_logprobs_NT")
    experience = one_group(
        x["mask_NT"], advantages_PG=x["advantages"][None], **{name: x[name] for name in names}, **fields
    )
    logprobs_NT = x["logprobs_NT"].detach().clone().requires_grad_()
    mask_NT = config.mask(experience)
    total = config.denominator(experience, mask_NT) if total is None else total
    loss = config(logprobs_NT, experience, mask_NT, total).value
    return loss.item(), torch.autograd.grad(loss, logprobs_NT)[0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weight_0_is_no_reward(aggregation: str) -> None:
    """Neither numerator nor denominator has it, but the one of ``constant``, which counts all completions."""
    config, x = ClippedSurrogate(aggregation=aggregation, kl_coef=0.1), example()
    weights_PG = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    loss, gradient_NT = objective_loss(config, x, weights_PG=weights_PG)
    without, expected_NT = objective_loss(config, x, valid_N=weights_PG[0] > 0)
    assert loss == without and torch.equal(gradient_NT, expected_NT)
    assert gradient_NT[1].eq(0).all() and gradient_NT[0].ne(0).any()
    counted = {"token": 6 + 1 + 4, "sequence": 3, "constant": 4 * T}[aggregation]
    experience = one_group(x["mask_NT"], weights_PG=weights_PG)
    assert config.denominator(experience, config.mask(experience)) == counted


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weight_1_changes_nothing(aggregation: str) -> None:
    config, x = ClippedSurrogate(aggregation=aggregation, kl_coef=0.1), example()
    plain, weighed = objective_loss(config, x), objective_loss(config, x, weights_PG=torch.ones(1, N))
    assert plain[0] == weighed[0] and torch.equal(plain[1], weighed[1])


@pytest.mark.parametrize(
    ("aggregation", "denominator"), [("token", 0.5 * 2 + 4 * 1), ("sequence", 0.5 + 4), ("constant", 2 * 4)]
)
def test_fractional_weights_by_hand(aggregation: str, denominator: float) -> None:
    """On policy the ratio is 1: completions of 2 and 1 tokens, A = 3 and −1, weights ½ and 4."""
    config = ClippedSurrogate(aggregation=aggregation)
    mask_NT = torch.tensor([[True, True], [True, False]])
    experience = one_group(
        mask_NT, max_new_tokens=4, advantages_PG=torch.tensor([[3.0, -1.0]]), weights_PG=torch.tensor([[0.5, 4.0]])
    )
    assert config.denominator(experience, mask_NT).item() == denominator
    logprobs_NT = torch.full((2, 2), -1.0).requires_grad_()
    loss = config(logprobs_NT, experience, config.mask(experience), torch.tensor(denominator)).value
    per_token = 0.5 * 3 / (2 if aggregation == "sequence" else 1)
    assert loss.item() == pytest.approx((-2 * per_token + 4) / denominator)
    loss.backward()
    expected_NT = torch.tensor([[-per_token, -per_token], [4.0, 0.0]]) / denominator
    torch.testing.assert_close(logprobs_NT.grad, expected_NT)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_do_not_depend_on_micro_batches(aggregation: str) -> None:
    """Denominators add up, and so do losses and gradients; one part has weight 0 throughout."""
    config, x = ClippedSurrogate(aggregation=aggregation, kl_coef=0.1), example()
    weights_N = torch.tensor([0.25, 3.0, 0.0, 1.5])
    parts = [({key: value[rows] for key, value in x.items()}, weights_N[rows]) for rows in ([0, 3], [2], [1])]
    experiences = [one_group(part["mask_NT"], weights_PG=weights_n[None]) for part, weights_n in parts]
    total = sum((config.denominator(e, config.mask(e)) for e in experiences), torch.tensor(0.0))
    whole_loss, whole_NT = objective_loss(config, x, weights_PG=weights_N[None])
    found = [objective_loss(config, part, total, weights_PG=weights_n[None]) for part, weights_n in parts]
    assert sum(loss for loss, _ in found) == pytest.approx(whole_loss, rel=1e-6)
    gradient_NT = torch.cat([gradient for _, gradient in found])[[0, 3, 2, 1]]
    torch.testing.assert_close(gradient_NT, whole_NT)


def test_all_weights_0_are_a_loss_of_0() -> None:
    loss, gradient_NT = objective_loss(ClippedSurrogate(kl_coef=0.1), example(), weights_PG=torch.zeros(1, N))
    assert loss == 0 and gradient_NT.eq(0).all()


# What the KL holds to


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_the_kl_is_to_its_anchor(estimator: str) -> None:
    """The iterate takes the place of the reference, whose KL is still what is logged."""
    x, iterate_NT = example(), example()["reference_logprobs_NT"].flip(0)
    options = {"kl_coef": 0.3, "kl_estimator": estimator}
    mirror = ClippedSurrogate(kl_anchor="iterate", **options)
    loss, gradient_NT = objective_loss(mirror, x, iterate_logprobs_NT=iterate_NT)
    expected = objective_loss(ClippedSurrogate(**options), x | {"reference_logprobs_NT": iterate_NT})
    assert loss == expected[0] and torch.equal(gradient_NT, expected[1])
    assert loss != objective_loss(ClippedSurrogate(**options), x)[0]
    _, metrics = losses.policy_loss(**x, config=mirror, denominator=torch.tensor(1.0), iterate_logprobs_NT=iterate_NT)
    kl_NT = losses.kl_k3(x["logprobs_NT"], x["reference_logprobs_NT"])
    assert metrics["kl"].item() == pytest.approx(kl_NT[x["mask_NT"]].sum().item())
    assert (mirror.needs, ClippedSurrogate(**options).needs) == ({"old", "iterate"}, {"old", "reference"})
    assert ClippedSurrogate().needs == {"old"}


def test_an_anchor_is_there_and_has_an_effect() -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs the iterate's log-probs, which are missing"):
        objective_loss(ClippedSurrogate(kl_coef=0.1, kl_anchor="iterate"), example())
    with pytest.raises(ValueError, match="kl_anchor=iterate has no effect with kl_coef=0"):
        ClippedSurrogate(kl_anchor="iterate")
    with pytest.raises(ValueError, match="kl_anchor='old' is unknown"):
        ClippedSurrogate(kl_anchor="old")  # type: ignore[arg-type]


def test_groups_without_an_advantage_are_not_active() -> None:
    """Unless there is a KL; also where tokens have the advantages."""
    mask_NT = torch.ones(2, 3, dtype=torch.bool)
    tokens_NT = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert not ClippedSurrogate().active(one_group(mask_NT))
    assert ClippedSurrogate(kl_coef=0.1).active(one_group(mask_NT))
    assert ClippedSurrogate().active(one_group(mask_NT, advantages_PG=torch.tensor([[0.0, 1.0]])))
    assert ClippedSurrogate().active(one_group(mask_NT, advantages_NT=tokens_NT))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k1"}, "expected gradient .* zero"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4'.*k3"),
        ({"aggregation": "mean"}, "aggregation='mean'.*sequence"),
        ({"importance_sampling": "word"}, "importance_sampling='word'"),
        ({"token_weight": "exp"}, "token_weight='exp'.*loglog"),
        ({"clip_low": 1.5}, r"clip_low=1\.5.*\[0, 1\]"),
        ({"clip_low": NAN}, "clip_low=nan"),
        ({"clip_high": -0.1}, r"clip_high=-0\.1"),
        ({"clip_ceiling": 1.1}, r"clip_ceiling=1\.1 must be above"),
        ({"kl_coef": -1.0}, r"kl_coef=-1\.0"),
        ({"kl_coef": NAN}, "kl_coef=nan"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedSurrogate(**options)


def test_missing_reference_and_wrong_shapes_are_refused() -> None:
    x = example()
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs the reference"):
        loss_of(ClippedSurrogate(kl_coef=0.1), x | {"reference_logprobs_NT": None})
    with pytest.raises(ValueError, match="does not fit the mask"):
        loss_of(ClippedSurrogate(), x | {"old_logprobs_NT": x["old_logprobs_NT"][:, :3]})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClippedSurrogate().clip_low = 0.3


def corrected_loss(logprobs_NT: Tensor, sampler_logprobs_NT: Tensor | None, **options: Any) -> Tensor:
    """Of one completion with advantage 2, on policy, with weights of at most 2."""
    loss, _ = losses.policy_loss(
        logprobs_NT,
        None,
        None,
        torch.tensor([2.0]),
        torch.ones_like(logprobs_NT, dtype=torch.bool),
        config=ClippedSurrogate(**{"sampler_correction_cap": 2.0, **options}),
        denominator=torch.tensor(1.0),
        sampler_logprobs_NT=sampler_logprobs_NT,
    )
    return loss


def test_sampler_correction_weighs_tokens_by_the_truncated_ratio() -> None:
    """Sampler probabilities 0.5, 0.2, 0.4 against the policy's 0.5, 0.5, 0.2: weights 1, min(2.5, 2), 0.5."""
    logprobs_NT = torch.tensor([[0.5, 0.5, 0.2]]).log().requires_grad_()
    corrected_loss(logprobs_NT, torch.tensor([[0.5, 0.2, 0.4]]).log()).backward()
    torch.testing.assert_close(logprobs_NT.grad, torch.tensor([[-2.0, -4.0, -1.0]]))
    with pytest.raises(ValueError, match="does not give"):
        corrected_loss(logprobs_NT, None)
    with pytest.raises(ValueError, match="at least 1"):
        ClippedSurrogate(sampler_correction_cap=0.5)
    with pytest.raises(ValueError, match="no effect without a cap"):
        ClippedSurrogate(sampler_correction="sequence_mask")


@pytest.mark.parametrize(
    ("kind", "cap", "weights"),
    [
        ("token_truncate", 2.0, [1.0, 2.0, 0.5]),
        ("token_mask", 2.0, [1.0, 0.0, 0.5]),
        ("sequence_truncate", 2.0, [1.25, 1.25, 1.25]),
        ("sequence_truncate", 1.2, [1.2, 1.2, 1.2]),
        ("sequence_mask", 2.0, [1.25, 1.25, 1.25]),
        ("sequence_mask", 1.2, [0.0, 0.0, 0.0]),
    ],
)
def test_sampler_corrections_by_hand(kind: str, cap: float, weights: list[float]) -> None:
    """Ratios of 1, 2.5 and 0.5, and 1.25 of the whole completion, as in TRL 1.16; what is masked is not read."""
    logprobs_NT = torch.tensor([[0.5, 0.5, 0.2]]).log().requires_grad_()
    options = {"sampler_correction": kind, "sampler_correction_cap": cap}
    corrected_loss(logprobs_NT, torch.tensor([[0.5, 0.2, 0.4]]).log(), **options).backward()
    torch.testing.assert_close(logprobs_NT.grad, -2 * torch.tensor([weights]))
    mask_NT = torch.tensor([[True, True, True, False]])
    old_NT, sampler_NT = (
        torch.tensor([[*row, x]]).log() for row, x in (([0.5, 0.5, 0.2], 99.0), ([0.5, 0.2, 0.4], 1.0))
    )
    found = estimators.sampler_correction(old_NT, sampler_NT, mask_NT, cap, kind).expand(1, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(found[:, :3], torch.tensor([weights]))
