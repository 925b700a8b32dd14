"""Ragged experiences, through all that reads them, against one unpadded forward per completion and loops."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.logprobs import completion_logprobs
from gopo_lightning.policy.prefix_sharing import check_shared_prefix
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.update_rule import Part
from gopo_lightning.types import Completions, Experience, Prompt, PromptBatch
from tests.runs import make_module
from tests.test_module import fit

NAN = math.nan
T_MAX = 7


@dataclass(frozen=True)
class Shape:
    """What an experience is drawn from: one group an entry, of three completions."""

    prompts: tuple[int, ...]
    """Tokens of each prompt."""
    completions: tuple[tuple[int, int, int], ...]
    """Tokens of each completion."""
    rewards: tuple[tuple[float, float, float], ...]
    num_minibatches: int = 1
    num_inner_epochs: int = 1
    micro_batch_tokens: int | None = None
    kl_coef: float = 0.0
    shared: bool = True
    aggregation: str = "token"


GROUPS = st.tuples(
    st.integers(1, 5),
    st.tuples(*[st.integers(1, T_MAX)] * 3),
    st.one_of(
        st.just((NAN, NAN, NAN)),
        st.just((1.0, 1.0, 1.0)),
        st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, NAN])] * 3),
    ),
)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.sampled_from([1, 2, 4]).flatmap(lambda n: st.lists(GROUPS, min_size=n, max_size=n)))
    prompts, completions, rewards = zip(*groups, strict=True)
    if draw(st.booleans()):  # one that is longer than all others
        completions = ((2 * T_MAX, *completions[0][1:]), *completions[1:])
    return Shape(
        prompts,
        completions,
        rewards,
        num_minibatches=draw(st.sampled_from([n for n in (1, 2, 4) if len(groups) % n == 0])),
        num_inner_epochs=draw(st.sampled_from([1, 2])),
        micro_batch_tokens=draw(st.sampled_from([None, 1, 20, 40])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])),
        shared=draw(st.booleans()),
        aggregation=draw(st.sampled_from(["token", "sequence", "constant"])),
    )


LONG_LAST = Shape((2, 3), ((1, 2, 1), (2 * T_MAX, 1, 3)), ((0.0, 1.0, 2.0), (0.0, 2.0, 1.0)), micro_batch_tokens=1)
ALL_TIED = Shape((2, 3), ((1, 2, 1), (5, 1, 3)), ((1.0, 1.0, 1.0), (NAN, NAN, NAN)), num_minibatches=2)


def experience_of(shape: Shape) -> Experience:
    generator = torch.Generator().manual_seed(sum(shape.prompts))

    def tokens(length: int) -> Tensor:
        return torch.randint(0, 256, (length,), generator=generator)

    prompts = [Prompt(i, tuple(tokens(length).tolist()), "") for i, length in enumerate(shape.prompts)]
    lengths_N = torch.tensor(shape.completions).flatten()
    mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    tokens_NT = torch.randint(0, 256, mask_NT.shape, generator=generator).masked_fill(~mask_NT, 258)
    completions = Completions(tokens_NT, mask_NT, torch.zeros(len(mask_NT), dtype=torch.bool), ("",) * len(mask_NT))
    rewards_PG = torch.tensor(shape.rewards)
    return Experience(
        PromptBatch.collate(prompts, 258),
        completions,
        rewards_PG[..., None],
        rewards_PG,
        2 * T_MAX,
        advantages_PG=ordinal(rewards_PG),
    )


def one_by_one(model: PreTrainedModel, experience: Experience) -> list[Tensor]:
    """Log-probs of each completion's tokens by plain transformers, without padding."""
    rows = []
    for n, mask_T in enumerate(experience.completions.mask_NT):
        prompt = torch.tensor(experience.prompts.prompts[n // 3].token_ids)
        tokens = experience.completions.tokens_NT[n, mask_T]
        logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return rows


def loss_by_loops(
    rows: list[Tensor],
    old: list[Tensor],
    reference: list[Tensor],
    experience: Experience,
    groups: set[int],
    shape: Shape,
) -> Tensor:
    """The loss of the groups of one minibatch, by the formula, token by token."""
    counted = [n for n in range(len(rows)) if n // 3 in groups]
    kept = [n for n in counted if not experience.rewards_PG.flatten()[n].isnan()]
    total = torch.zeros(())
    for n in kept:
        A, length = experience.advantages_PG.flatten()[n], len(rows[n])
        for t in range(length):
            ratio = (rows[n][t] - old[n][t]).exp()
            d = reference[n][t] - rows[n][t]
            term = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + shape.kl_coef * (d.exp() - d - 1)
            total = total + (term / length if shape.aggregation == "sequence" else term)
    tokens = sum(len(rows[n]) for n in kept)
    denominator = {"token": tokens, "sequence": len(kept), "constant": len(counted) * 2 * T_MAX}[shape.aggregation]
    return total / max(denominator, 1)


@pytest.fixture(scope="module")
def models(tiny_policy: Path) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """One for the module, one for the loops, and a reference that is near."""
    policy, plain, reference = (AutoModelForCausalLM.from_pretrained(tiny_policy).train() for _ in range(3))
    with torch.no_grad():
        for i, parameter in enumerate(reference.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += 0.02 * noise
    return policy, plain, reference.eval()


def flat_gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def module_with(shape: Shape, tiny_policy: Path, policy: PreTrainedModel, reference: PreTrainedModel) -> GOPOModule:
    """A module whose updates only leave their gradients."""
    module = make_module(
        tiny_policy,
        num_completions=3,
        sampling=replace(make_module(tiny_policy).sampling, max_new_tokens=2 * T_MAX),
        loss=ClippedSurrogate(kl_coef=shape.kl_coef, aggregation=shape.aggregation),  # type: ignore[arg-type]
        **{key: getattr(shape, key) for key in ("num_minibatches", "num_inner_epochs", "micro_batch_tokens")},
    )
    module.policy, module.forward_pass.shares_prefix = policy, shape.shared
    module.reference = SimpleNamespace(of=lambda _: _Given(reference))  # type: ignore[assignment]
    module._trainer = SimpleNamespace(global_step=0, strategy=None)  # type: ignore[assignment]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return module


class _Given:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *_: Any) -> None:
        pass


MANY = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(shapes())
@example(LONG_LAST)
@example(ALL_TIED)
def test_an_update_has_the_gradient_of_the_loops(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel], tiny_policy: Path, shape: Shape
) -> None:
    """Every minibatch of every inner epoch; the policy stays where it was, so that the ratios are 1."""
    policy, plain, reference = models
    module, experience = module_with(shape, tiny_policy, policy, reference), experience_of(shape)
    updates: list[tuple[Tensor, Tensor]] = []
    groups: list[set[int]] = []

    def keep_gradient(*args: Any) -> dict[str, Tensor]:
        updates.append((args[-1]["loss"][0], flat_gradient(policy)))
        policy.zero_grad()
        return {}

    module.update._step = keep_gradient  # type: ignore[method-assign]
    with_logprobs = module._with_logprobs(experience, module.needs)
    for groups_P in module._minibatches(with_logprobs):
        groups.append(set(groups_P.tolist()))
        module.update(module, policy, [Part(module.terms[0], with_logprobs, groups_P)])
    assert len(groups) == shape.num_minibatches * shape.num_inner_epochs
    for epoch in range(shape.num_inner_epochs):
        part = groups[epoch * shape.num_minibatches : (epoch + 1) * shape.num_minibatches]
        assert sorted(group for part_groups in part for group in part_groups) == list(range(len(experience)))
    with torch.no_grad():
        reference_rows = one_by_one(reference, experience)
    for (loss, gradient), part_groups in zip(updates, groups, strict=True):
        rows = one_by_one(plain, experience)
        expected = loss_by_loops(rows, [row.detach() for row in rows], reference_rows, experience, part_groups, shape)
        plain.zero_grad()
        if expected.requires_grad:
            expected.backward()
        torch.testing.assert_close(loss.float(), expected.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, flat_gradient(plain), rtol=1e-3, atol=2e-6)


@MANY
@given(shapes())
@example(LONG_LAST)
def test_frozen_logprobs_are_those_of_each_completion_alone(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel], tiny_policy: Path, shape: Shape
) -> None:
    policy, plain, reference = models
    module, experience = module_with(shape, tiny_policy, policy, reference), experience_of(shape)
    logprobs_NT = module.forward_pass.frozen(policy, experience)
    mask_NT = experience.completions.mask_NT
    with torch.no_grad():
        expected = one_by_one(plain, experience)
    torch.testing.assert_close(logprobs_NT[mask_NT], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert not logprobs_NT[~mask_NT].any()


@MANY
@given(shapes(), st.data())
@example(LONG_LAST, None)
def test_both_forms_agree_on_every_selection(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel], shape: Shape, data: st.DataObject | None
) -> None:
    policy, _, _ = models
    experience = experience_of(shape)
    order = list(range(len(experience)))
    rows = order[:1] if data is None else data.draw(st.lists(st.sampled_from(order), min_size=1, unique=True))
    selected = experience.select(torch.tensor(rows))
    prompts, completions = selected.prompts, selected.completions
    shared, replicated = (
        completion_logprobs(policy, prompts, completions, with_entropy=True, shared_prefix=shared)
        for shared in (True, False)
    )
    torch.testing.assert_close(shared.logprobs_NT, replicated.logprobs_NT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.entropy_NT, replicated.entropy_NT, rtol=1e-4, atol=1e-5)
    assert check_shared_prefix(policy, prompts, completions).ok
    assert check_shared_prefix(policy, experience.prompts, experience.completions).ok


def test_the_tiny_policy_ends_by_itself(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Most of its completions do, and at many lengths: else the other tests would see no ragged batch."""
    keep = fit(make_module(tiny_policy), prompts_file, tmp_path, max_steps=4)
    lengths: dict[bool, list[int]] = defaultdict(list)
    for experience in keep.experiences:
        for length, truncated in zip(
            experience.completions.lengths_N.tolist(), experience.completions.truncated_N.tolist(), strict=True
        ):
            lengths[truncated].append(length)
    assert len(lengths[True]) < len(lengths[False])
    assert len(set(lengths[False])) >= 6


@pytest.mark.parametrize(
    ("mode", "saved", "expected"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("always", True, True),
        ("always", False, None),
        ("never", True, None),
    ],
)
def test_a_resumed_run_shares_prompts_as_before(mode: Any, saved: bool, expected: bool | None) -> None:
    """Where the mode allows it; None: it is tried anew."""
    forward = PolicyForward(1.0, None, mode)
    forward.restore(saved)
    assert forward.shares_prefix is expected
