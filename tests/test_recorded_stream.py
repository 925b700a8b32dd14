"""Losses of recorded groups: alone, as each offline method trains, and added to that of the rollout."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.objectives import ClippedSurrogate, GroupPreference, PairObjective
from gopo_lightning.rewards import RecordedReward
from gopo_lightning.rollout import RecordedEngine, SamplingConfig
from gopo_lightning.training.config import RecordedTerm
from tests.ranks import Case, assert_same_run, launch, on, read, run_case
from tests.runs import make_data, make_module, make_trainer, weights
from tests.test_recorded import ROWS, write
from tests.test_resume import assert_identical

OFFLINE = ("dpo", "pro", "lipo", "copg", "gepo")
RECORDED: dict[str, Any] = {"engine": RecordedEngine(), "rewards": [RecordedReward()]}
ONE = {"sampling": SamplingConfig(max_new_tokens=12), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}


def rows(folder: Path, number: int = 1) -> Path:
    """Answers of 1 to 18 tokens, ties, five answers in a row; nothing that this policy has written."""
    return write(folder, ROWS * number)


def term(path: Path, **options: Any) -> RecordedTerm:
    given: dict[str, Any] = {"loss": GroupPreference(anchor="reference"), "weight": 0.5, "name": "gepo"}
    given |= {"prompts_per_step": 4, "num_completions": 4}
    return RecordedTerm(PromptSource(str(path)), **(given | options))


# Offline alone


@pytest.mark.parametrize("method", OFFLINE)
def test_an_offline_method_trains_on_a_file_and_resumes(method: str, tiny_policy: Path, tmp_path: Path) -> None:
    """By the overlay of the method and the options that docs/how-to/recorded.md shows."""
    shown = yaml.safe_load(
        Path("docs/how-to/recorded.md").read_text().split("```yaml")[1].split("```")[0].split("\n", 1)[1]
    )
    shown["data"]["init_args"]["train"]["path"] = str(rows(tmp_path, 2))
    rollout = {"sampling": {"max_new_tokens": 12}, "num_completions": 4}
    task = {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "limit_val_batches": 0, "enable_progress_bar": False},
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(tiny_policy)},
                "rollout": rollout,
                "update": {"warmup_steps": 0, "micro_batch_tokens": 120, "optimizer": {"class_path": "AdamW"}},
            },
        },
        "data": {"class_path": "gopo_lightning.PromptDataModule", "init_args": {"prompts_per_step": 4}},
    }
    shown["model"]["init_args"]["rollout"] |= rollout
    task["trainer"]["callbacks"] = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"},
        }
    ]
    configs = []
    for number, layer in enumerate((task, shown)):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(layer))
        configs.append(f"--config={tmp_path / f'{number}.yaml'}")
    fit = ["fit", *configs, f"--config=configs/methods/{method}.yaml", "--trainer.max_steps=3"]

    def logger(name: str) -> list[str]:
        options = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: {name}, version: a}}}}"
        return [f"--trainer.logger={options}"]

    whole = run([*fit, *logger("whole")]).model
    first = tmp_path / "whole/a/checkpoints/step=1.ckpt"
    rest = run([*fit, *logger("rest"), f"--ckpt_path={first}"]).model
    before = torch.load(first, weights_only=True)["state_dict"]
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())
    assert_identical(rest.state_dict(), whole.state_dict())


# Beside the rollout


def change(folder: Path, policy: Path, data: Any, **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """What one update changes, and the metrics."""
    trainer = make_trainer(folder, max_steps=1, limit_val_batches=0)
    module = make_module(policy, **(ONE | options))
    before = make_module(policy)
    before.configure_model()
    trainer.fit(module, data)
    return weights(module) - weights(before), {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_gradient_is_the_weighted_sum(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Of the rollout's own, and of recorded groups as they train alone, whatever the micro-batches are."""
    path, loss = rows(tmp_path), PairObjective(anchor="reference", link="logistic", beta=0.1)
    sampled, _ = change(tmp_path / "a", tiny_policy, make_data(prompts_file))
    alone, metrics = change(
        tmp_path / "b", tiny_policy, make_data(path, validation=None), **RECORDED, loss=loss, advantage="ordinal"
    )
    for budget in (None, 60):
        also = [term(path, loss=loss, weight=0.5)]
        both, together = change(
            tmp_path / f"c{budget}", tiny_policy, make_data(prompts_file), also=also, micro_batch_tokens=budget
        )
        torch.testing.assert_close(both, sampled + 0.5 * alone, rtol=0, atol=1e-6)
        assert together["train/gepo/loss"] == pytest.approx(metrics["train/loss"], rel=1e-5)
        assert together["train/gepo/pair_accuracy"] == metrics["train/pair_accuracy"]
    assert min(sampled.norm(), alone.norm()) > 1e-3


def case(name: str, path: Path, **more: Any) -> Case:
    """OORL's sum and a weighted likelihood, several updates a rollout; completions of natural lengths."""
    also = [
        term(path),
        term(path, loss=ClippedSurrogate(), advantage="rloo", name="likelihood", prompts_per_step=2, weight=0.1),
    ]
    return Case(name, module={"also": also, "num_minibatches": 2} | more, max_steps=6)


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    path = rows(folder, 3)
    run_case(case("sum", path), tiny_policy, prompts_file, folder, 1)
    run_case(replace(case("half.first", path), max_steps=2), tiny_policy, prompts_file, folder, 1)
    run_case(replace(case("half.rest", path), resume="half.first.ckpt"), tiny_policy, prompts_file, folder, 1)
    cases = [on(strategy, case("sum", path)) for strategy in ("ddp", "fsdp2")]
    launch(cases, tiny_policy, prompts_file, folder, 2)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_add_up_like_one(strategy: str, results: Path) -> None:
    assert_same_run(results, f"{strategy}-sum", "sum")
    steps = [read(results, name)[0]["steps"] for name in (f"{strategy}-sum", "sum")]
    for step, (mine, theirs) in enumerate(zip(*steps, strict=True)):
        # At first the policy is the reference: the signs of the margins are those of their round-off.
        for name in ("gepo/loss", "likelihood/loss", *(("gepo/pair_accuracy",) if step else ())):
            assert mine["metrics"][f"train/{name}"] == pytest.approx(theirs["metrics"][f"train/{name}"], abs=1e-5)


def test_each_stream_goes_on_where_it_was(results: Path) -> None:
    rest, whole = read(results, "half.rest"), read(results, "sum")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(rest[1][key], whole[1][key])
    places = whole[1]["callbacks"]["RolloutCallback"]["streams"]
    assert rest[1]["callbacks"]["RolloutCallback"]["streams"] == places
    expected = {"gepo": {"step": 3, "epoch": 1, "offset": 0}, "likelihood": {"step": 3, "epoch": 0, "offset": 6}}
    assert places == expected


def test_other_data_are_refused_on_resume(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    path, data = rows(tmp_path), make_data(prompts_file)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(tiny_policy, also=[term(path)]), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    changed = [{**row, "ranks": row["ranks"][::-1]} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    again = make_trainer(tmp_path / "again", max_steps=2, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"other settings: also\.gepo\.rows"):
        again.fit(make_module(tiny_policy, also=[term(path)]), make_data(prompts_file), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "'gepo': weight=0.0 must be above 0"),
        ({"weight": math.nan}, "weight=nan must be above 0"),
        ({"name": "a/b"}, "'a/b': a name is letters"),
        ({"num_completions": 1}, "num_completions=1 must be at least 2"),
        ({"prompts_per_step": 3}, "num_minibatches=2 must divide its prompts_per_step=3"),
        ({"advantage": "grpo"}, "advantage=grpo has no effect"),
        ({"loss": ClippedSurrogate(sampler_correction_cap=2.0)}, "reads the sampler's log-probs, and nothing"),
        ({"loss": ClippedSurrogate(kl_coef=0.1, kl_anchor="iterate")}, "set objective.iterate_every"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_policy, also=[term(tmp_path, **options)], num_minibatches=2)


def test_two_of_a_name_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['gepo'\] several times"):
        make_module(tiny_policy, also=[term(tmp_path), term(tmp_path)])


def test_in_python_and_yaml_a_dict_is_enough(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    path = rows(tmp_path)
    also = [{"data": {"path": str(path)}, "loss": GroupPreference(), "num_completions": 4, "prompts_per_step": 2}]
    _, metrics = change(tmp_path, tiny_policy, make_data(prompts_file), also=also)
    assert metrics["train/recorded/loss"] > 0
