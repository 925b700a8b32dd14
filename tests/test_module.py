"""GOPOModule: what one optimiser step does, what it does not depend on, what is saved, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.update import GradientUpdate
from tests.runs import make_data, make_module, make_trainer, weights


class Keep(Callback):
    """Keeps each batch's experience and the weights after it."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.experiences.append(batch["experience"])
        self.weights.append(weights(pl_module))


def fit(module: GOPOModule, prompts_file: Path, folder: Path, ckpt_path: str | None = None, **trainer: Any) -> Keep:
    """Train; returns what was kept."""
    keep = Keep()
    callbacks = [keep, *trainer.pop("callbacks", [])]
    make_trainer(folder, callbacks=callbacks, **trainer).fit(module, make_data(prompts_file), ckpt_path=ckpt_path)
    return keep


def invalid_reward() -> list[Any]:
    return [FunctionReward("tests.runs.some_invalid", name="vowels")]


def test_one_step_is_the_gradient_of_the_formula(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The change of weights under SGD with lr 1, against one plain forward per completion and the formula by hand."""
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=1.0)}
    module = make_module(tiny_policy, rewards=invalid_reward(), **sgd)
    experience = (keep := fit(module, prompts_file, tmp_path, max_steps=1)).experiences[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    completions = experience.completions
    advantages_N = ordinal(experience.rewards_PG).flatten()
    valid_N = ~experience.rewards_PG.isnan().flatten()
    num_tokens = sum(int(completions.lengths_N[n]) for n in range(len(completions)) if valid_N[n])
    assert 0 < int(valid_N.sum()) < len(completions) and advantages_N.any()
    loss = torch.zeros(())
    for n in range(len(completions)):
        prompt = experience.prompts.prompts[n // 4].token_ids
        tokens = completions.tokens_NT[n, completions.mask_NT[n]]
        logits = model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        if valid_N[n]:
            loss = loss - advantages_N[n] * logprobs.sum() / num_tokens
    loss.backward()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(start - keep.weights[0], gradient, rtol=1e-4, atol=1e-6)
    assert gradient.norm() > 1e-2


@pytest.mark.parametrize(
    "loss", [ClippedSurrogate(), ClippedSurrogate(aggregation="sequence"), ClippedSurrogate(aggregation="constant")]
)
def test_the_split_into_micro_batches_does_not_matter(
    loss: ClippedSurrogate, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    results = []
    for budget in (None, 100, 1):
        module = make_module(tiny_policy, rewards=invalid_reward(), loss=loss, micro_batch_tokens=budget)
        results.append(fit(module, prompts_file, tmp_path / str(budget)).weights[-1])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=2e-6)


def test_groups_without_advantage_are_not_forwarded(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With β = 0 a tied group gives no gradient, so leaving it out changes nothing but the time."""
    forwarded: list[int] = []
    original = GradientUpdate._accumulate

    def spy(self: GradientUpdate, module: Any, policy: Any, experience: Any, *args: Any) -> None:
        forwarded.append(len(experience))
        original(self, module, policy, experience, *args)

    monkeypatch.setattr(GradientUpdate, "_accumulate", spy)
    skipping = fit(make_module(tiny_policy, rewards=invalid_reward()), prompts_file, tmp_path / "a", max_steps=1)
    active = int(skipping.experiences[0].advantages_PG.ne(0).any(-1).sum())
    assert sum(forwarded) == active < 4
    split = PolicyForward.micro_batches
    monkeypatch.setattr(PolicyForward, "micro_batches", lambda self, experience, *_: split(self, experience))
    complete = fit(make_module(tiny_policy, rewards=invalid_reward()), prompts_file, tmp_path / "b", max_steps=1)
    torch.testing.assert_close(complete.weights[0], skipping.weights[0], rtol=0, atol=1e-6)


def test_inner_epochs_use_the_log_probs_of_the_policy_that_sampled(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, num_inner_epochs=2, num_minibatches=2)
    keep = fit(module, prompts_file, tmp_path, max_steps=8)
    assert len(keep.experiences) == 2  # 4 optimiser steps a rollout
    ratios = scalars(tmp_path, "train/ratio")
    assert abs(ratios[0] - 1) > 1e-4  # the mean over the updates of a rollout, of which only the first is at ratio 1


def test_reference_is_loaded_only_if_something_reads_it(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    plain = make_module(tiny_policy)
    fit(plain, prompts_file, tmp_path / "plain", max_steps=1)
    assert plain.reference.copy is None
    with_kl = make_module(tiny_policy, loss=ClippedSurrogate(kl_coef=0.1))
    fit(with_kl, prompts_file, tmp_path / "kl")
    assert with_kl.reference.copy is not None
    assert scalars(tmp_path / "kl", "train/kl")[0] == pytest.approx(0, abs=1e-6)
    assert scalars(tmp_path / "kl", "train/kl")[1] > 1e-5


def test_under_lora_the_reference_is_the_base(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    lora = PolicyConfig(str(tiny_policy), lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    module = make_module(tiny_policy, policy=lora, loss=ClippedSurrogate(kl_coef=0.1))
    fit(module, prompts_file, tmp_path, max_steps=3)
    assert module.reference.copy is None
    kl = scalars(tmp_path, "train/kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    frozen = [p for name, p in module.policy.named_parameters() if "lora_" not in name]
    assert all(torch.equal(a, b) for a, b in zip(frozen, base.parameters(), strict=True))


def test_a_checkpoint_holds_policy_and_optimiser_and_nothing_frozen(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(
        tiny_policy, loss=ClippedSurrogate(kl_coef=0.1), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3)
    )
    path = tmp_path / "run.ckpt"
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data(prompts_file))
    trainer.save_checkpoint(path)
    policy_bytes = sum(p.numel() * p.element_size() for p in module.policy.parameters())
    assert path.stat().st_size < 3 * policy_bytes * 1.01 + 60_000  # policy, two moments; small bookkeeping
    assert all(key.startswith("policy.") for key in torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_resumed_run_ends_with_the_same_weights(
    stop_after: int, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """Bit for bit, interrupted in the middle of an epoch (2 of 3 batches) and at its end."""

    def module() -> GOPOModule:
        return make_module(tiny_policy, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), warmup_steps=3)

    whole = fit(module(), prompts_file, tmp_path / "whole", max_steps=5)
    keeper = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module(), prompts_file, tmp_path / "first", max_steps=stop_after, callbacks=[keeper])
    path = str(tmp_path / "ckpt" / f"step={stop_after}.ckpt")
    rest = fit(module(), prompts_file, tmp_path / "rest", ckpt_path=path, max_steps=5)
    assert rest.experiences[-1].completions.texts == whole.experiences[-1].completions.texts
    assert torch.equal(rest.weights[-1], whole.weights[-1])


def test_validation_at_step_0_is_a_draw_and_the_reference_outlives_a_resume(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    keeper = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=4)
    fit(module, prompts_file, tmp_path, max_steps=4, callbacks=[keeper])
    wins = scalars(tmp_path, "val/win_rate")
    assert wins[0] == 0.5 and len(wins) == 3
    again = make_module(tiny_policy)
    (path,) = (tmp_path / "ckpt").glob("*.ckpt")
    trainer = make_trainer(tmp_path)
    (result,) = trainer.validate(again, make_data(prompts_file), ckpt_path=str(path), verbose=False)
    assert result["val/win_rate"] == pytest.approx(wins[-1])
    stored = dict(again.validation.stored.state_dict())
    again.validation.stored.load_state_dict({})  # lost: it is sampled anew from the step-0 weights
    (result,) = trainer.validate(again, make_data(prompts_file), ckpt_path=None, verbose=False)
    assert again.validation.stored.state_dict() == stored


def test_every_curve_is_drawn_over_optimiser_steps(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    fit(make_module(tiny_policy, num_inner_epochs=2), prompts_file, tmp_path, max_steps=4)
    (events,) = (tmp_path / "run").glob("version_*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in accumulator.Scalars("val/reward")] == [0, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy)

    module.rollout_callback.on_train_batch_start = _then_poison(module)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must be finite"):
        fit(module, prompts_file, tmp_path, max_steps=1)
    assert list(tmp_path.rglob("nonfinite_step0_rank0.pt"))


def _then_poison(module: GOPOModule) -> Any:
    original = module.rollout_callback.on_train_batch_start

    def hook(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        original(trainer, pl_module, batch, batch_idx)
        pl_module.policy.lm_head.weight.data.fill_(float("nan"))

    return hook


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_clip_val": 1.0}, "max_grad_norm"),
        ({"accumulate_grad_batches": 2}, "micro_batch_tokens"),
        ({"max_steps": 3}, "multiple of num_inner_epochs"),
        ({"callbacks": [ModelCheckpoint(every_n_train_steps=3)]}, "every_n_train_steps"),
    ],
)
def test_trainer_options_that_would_be_ignored_are_refused(
    trainer: dict[str, Any], message: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, num_inner_epochs=2)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **({"max_steps": 4} | trainer)).fit(module, make_data(prompts_file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 1}, "at least 2 completions"),
        ({"rewards": []}, "rewards is empty"),
        ({"advantage": "nonsense"}, "nonsense"),
        ({"num_minibatches": 0}, "num_minibatches=0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0; use null"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"advantage": {"function": "ordinal", "init_args": {"tie": "average"}}}, "tie"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_policy, **options)


def test_minibatches_must_divide_the_prompts(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_minibatches=3 must divide"):
        fit(make_module(tiny_policy, num_minibatches=3), prompts_file, tmp_path, max_steps=3)


def test_greedy_training_is_refused_and_filters_warn(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    greedy = make_module(tiny_policy, sampling=SamplingConfig(temperature=0, max_new_tokens=4))
    with pytest.raises(ValueError, match="greedy"):
        fit(greedy, prompts_file, tmp_path, max_steps=1)
    filtered = make_module(tiny_policy, sampling=SamplingConfig(top_p=0.9, max_new_tokens=4), num_inner_epochs=2)
    with pytest.warns(UserWarning, match="policy ratio is inexact"):
        fit(filtered, prompts_file, tmp_path, max_steps=2)


def scalars(folder: Path, tag: str) -> list[float]:
    """The values of a TensorBoard tag of the only run below ``folder``."""
    (run,) = (folder / "run").glob("version_0")
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(tag)]


def test_replace_keeps_experience_frozen(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    experience = fit(make_module(tiny_policy), prompts_file, tmp_path, max_steps=1).experiences[0]
    with pytest.raises(AttributeError):
        experience.rewards_PG = None
    assert replace(experience).select(torch.tensor([2, 0])).prompts.prompts[0] == experience.prompts.prompts[2]
