"""Flags and configs of before the six groups are told the new line; what kept its name is left alone."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.commands.renamed import ARGUMENTS, refuse_old_names
from gopo_lightning.training import config as groups
from tests.test_doors import write_config

GROUPS = {
    "rollout": groups.RolloutConfig,
    "rewards": groups.RewardConfig,
    "objective": groups.ObjectiveConfig,
    "update": groups.UpdateConfig,
}
QUICKSTART = ["--config", "configs/quickstart/gopo.yaml"]
FUNCTION = {"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": {"function": "tests.runs.count_vowels"}}


@pytest.mark.parametrize(
    ("flags", "old", "new"),
    [
        (["--model.init_args.sampling.max_new_tokens=8"], "sampling", "rollout.sampling"),
        (["--model.advantage", "grpo"], "advantage", "objective.advantage"),
        (
            ['--model.init_args.combine_options={"weights": [1]}'],
            "combine_options",
            "rewards.combine: {function: NAME, init_args: {…}}",
        ),
        (["--model.init_args.rewards+=[{}]"], "rewards", "rewards.sources"),
    ],
)
def test_an_old_flag_is_told_the_new_one(flags: list[str], old: str, new: str) -> None:
    with pytest.raises(ValueError, match="names of an earlier version") as error:
        run([*QUICKSTART, *flags], instantiate_only=True)
    assert str(error.value).splitlines()[1:] == [f"  --model.init_args.{old} is now --model.init_args.{new}"]


def test_all_old_names_are_told_at_once() -> None:
    flags = ["--model.init_args.micro_batch_tokens=8", "--model.init_args.loss.clip_low=0.1"]
    with pytest.raises(ValueError, match=r"update\.micro_batch_tokens\n.*objective\.loss: \{class_path"):
        run([*QUICKSTART, *flags], instantiate_only=True)


def write(folder: Path, name: str, options: dict[str, Any], **model: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"model": {**model, "init_args": options}}))
    return path


def test_an_old_config_is_told_the_new_lines(tmp_path: Path) -> None:
    old = {"policy": {"name": "x"}, "num_completions": 4, "rewards": [FUNCTION]}
    path = write(tmp_path, "old.yaml", old, class_path="gopo_lightning.GOPOModule")
    for given in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        with pytest.raises(ValueError, match="names of an earlier version") as error:
            run(given, instantiate_only=True)
        assert str(error.value).splitlines()[1:] == [
            f"  {path}: model.init_args.num_completions is now model.init_args.rollout.num_completions",
            f"  {path}: the list model.init_args.rewards is now model.init_args.rewards.sources",
        ]


def test_an_old_overlay_is_told_though_it_names_no_class(tmp_path: Path) -> None:
    path = write(tmp_path, "overlay.yaml", {"advantage": "grpo"})
    with pytest.raises(ValueError, match=r"overlay\.yaml: .*\.advantage is now model\.init_args\.objective\.advantage"):
        run([*QUICKSTART, "--config", str(path)], instantiate_only=True)


def test_a_config_of_now_passes(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    groups = {"objective": {"advantage": "grpo"}, "update": {"micro_batch_tokens": 512}}
    path = write_config(tmp_path, tiny_policy, prompts_file, groups)
    flags = ["--model.init_args.update.num_inner_epochs=2", "--model.init_args.rollout.sampling.top_k=3"]
    model = run(["--config", str(path), *flags], instantiate_only=True).model
    assert (model.objective_config.advantage, model.updates_per_batch, model.sampling.top_k) == ("grpo", 4, 3)


def test_options_of_reward_models_keep_their_names() -> None:
    """They are called as some old names of the policy's module are."""
    config = ["--config", "configs/quickstart/reward_model.yaml"]
    module = run([*config, "--model.init_args.warmup_steps=7", "--model.lr_schedule=linear"], instantiate_only=True)
    assert (module.model.schedule.warmup_steps, module.model.schedule.name) == (7, "linear")


def test_every_new_place_is_there() -> None:
    for old, new in {**ARGUMENTS, "rewards": "rewards.sources"}.items():
        group, name = re.match(r"(\w+)\.(\w+)", new).groups()  # type: ignore[union-attr]
        assert name in {field.name for field in fields(GROUPS[group])}, f"{old}: {new}"


def test_the_changelog_has_the_table() -> None:
    text = Path("CHANGELOG.md").read_text(encoding="utf-8")
    table = text[text.index("| old | new |") :].split("\n- ")[0]
    rows = dict(re.findall(r"^  \| `(\w+)` \| `(.+)` \|$", table, re.M))
    assert rows == ARGUMENTS
    assert "| `rewards`, a list | `rewards.sources` |" in table


@pytest.mark.parametrize("named", [["--model", "GOPOModule"], ["--model.class_path=gopo_lightning.GOPOModule"]])
def test_a_module_that_flags_name_is_told_too(named: list[str]) -> None:
    with pytest.raises(ValueError, match=r"num_completions is now --model\.init_args\.rollout\.num_completions"):
        refuse_old_names([*named, "--model.init_args.num_completions", "4"])
    refuse_old_names(
        [named[0].replace("GOPOModule", "RewardModelModule"), "RewardModelModule", "--model.warmup_steps=4"]
    )
