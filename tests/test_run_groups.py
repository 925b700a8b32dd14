"""Which runs are of one group, and what it is called."""

from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.evaluation.event_files import Run, read_run
from gopo_lightning.evaluation.run_groups import (
    baseline_of,
    differing,
    flatten,
    group_runs,
    labels,
    seed_of,
    settings,
    short_name,
    short_value,
)
from tests.event_runs import write_config


def test_a_config_is_flattened() -> None:
    assert flatten({"a": {"b": [1, None, {"c": "x"}]}, "d": {}, "e": []}) == {
        "a.b.0": "1",
        "a.b.1": "null",
        "a.b.2.c": "x",
        "d": "{}",
        "e": "[]",
    }


def test_two_callbacks_of_one_class_are_two() -> None:
    callbacks = [{"class_path": "mine.Freeze", "init_args": {"layers": n}} for n in (1, 2)]
    callbacks.append({"class_path": "lightning.ModelCheckpoint", "init_args": {"dirpath": "x"}})
    found = settings({"trainer": {"callbacks": [*callbacks, callbacks[-1]]}})
    assert [found[f"trainer.callbacks.Freeze{name}.init_args.layers"] for name in ("", ".2")] == ["1", "2"]
    assert not any("ModelCheckpoint" in key for key in found)


def test_what_does_not_matter_is_no_setting() -> None:
    base = {"model": {"init_args": {"x": 1}}, "trainer": {"max_steps": 5}}
    other = {
        "seed_everything": 7,
        "ckpt_path": "last",
        "export_dir": "here",
        "model": {"init_args": {"x": 1, "seed": 3}},
        "data": {"init_args": {"seed": 4}},
        "trainer": {
            "max_steps": 5,
            "default_root_dir": "x",
            "logger": [{"class_path": "a.CSVLogger"}],
            "callbacks": [{"class_path": "gopo_lightning.callbacks.SampleTable", "init_args": {"every_n_steps": 1}}],
        },
    }
    assert settings(base) == settings(other) == {"model.init_args.x": "1", "trainer.max_steps": "5"}
    watched = {"trainer": {"callbacks": [{"class_path": "mine.Freeze", "init_args": {"layers": 2}}]}}
    assert settings(watched)["trainer.callbacks.Freeze.init_args.layers"] == "2"


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [((1, None, None), "1"), ((1, 2, None), "1, model 2"), ((1, 2, 3), "1, model 2, data 3")],
)
def test_the_seed_of_a_run(seeds: tuple[int, ...], expected: str) -> None:
    everything, model, data = seeds
    config = {
        "seed_everything": everything,
        "model": {"init_args": {"seed": model}},
        "data": {"init_args": {"seed": data}},
    }
    assert seed_of(Run(Path("run"), config, {}, {})) == expected


def test_the_seed_of_a_reward_is_a_seed() -> None:
    """As in the study, whose noise has the seed of the run: two groups of two runs, paired by seed."""
    runs = [
        Run(Path(f"{lr}-{seed}"), _with_noise(lr, seed, seed), {"train/loss": {1: 1.0}}, {})
        for lr in (1, 2)
        for seed in (1, 2)
    ]
    groups, notes = group_runs(runs)
    assert [list(group.runs) for group in groups] == [["1", "2"], ["1", "2"]] and not notes
    assert seed_of(Run(Path("x"), _with_noise(1, 1, 0), {}, {})) == "1"
    assert seed_of(Run(Path("x"), _with_noise(1, 1, 7), {}, {})) == "1, rewards.sources.0 7"


def _with_noise(lr: int, seed: int, noise: int) -> dict[str, Any]:
    source = {"class_path": "x.Proxy", "init_args": {"seed": noise}}
    return {"seed_everything": seed, "model": {"init_args": {"rewards": {"sources": [source]}, "lr": lr}}}


def test_without_a_config_the_folder_says_which_run_it_is() -> None:
    names = ["gopo-seed1", "gopo-seed2", "grpo_seed=1", "other"]
    groups, _ = group_runs([Run(Path("x") / name, {}, {"train/loss": {1: 1.0}}, {}) for name in names])
    assert {group.label: list(group.runs) for group in groups} == {
        "run=gopo": ["1", "2"],
        "run=grpo": ["1"],
        "run=x/other": ["unknown"],
    }


def test_runs_that_differ_in_their_seeds_alone_are_one_group(tmp_path: Path) -> None:
    made = [("ordinal", 10, 2), ("ordinal", 1, 2), ("grpo", 1, 2), ("grpo", 2, 2), ("grpo", 1, 8)]
    for i, (advantage, seed, prompts) in enumerate(made):
        write_config(
            tmp_path / str(i),
            seed,
            model__init_args__objective__advantage=advantage,
            data__init_args__prompts_per_step=str(prompts),
        )
    groups, notes = group_runs([read_run(tmp_path / str(i)) for i in range(len(made))])
    assert not notes
    assert {group.label: {s: run.folder.name for s, run in group.runs.items()} for group in groups} == {
        "objective.advantage=ordinal, data.prompts_per_step=2": {"1": "1", "10": "0"},
        "objective.advantage=grpo, data.prompts_per_step=2": {"1": "2", "2": "3"},
        "objective.advantage=grpo, data.prompts_per_step=8": {"1": "4"},
    }


def test_a_label_names_as_few_settings_as_tell_the_groups_apart() -> None:
    configs = [
        {"model.init_args.objective.advantage": "ordinal", "trainer.max_steps": "20", "data.x": "1"},
        {"model.init_args.objective.advantage": "grpo", "trainer.max_steps": "20", "data.x": "2"},
        {"model.init_args.objective.advantage": "grpo", "trainer.max_steps": "40", "data.x": "2"},
    ]
    assert labels(configs) == [
        "objective.advantage=ordinal, trainer.max_steps=20",
        "objective.advantage=grpo, trainer.max_steps=20",
        "objective.advantage=grpo, trainer.max_steps=40",
    ]
    assert differing(configs)["data.x"] == ["1", "2", "2"]
    assert differing([{"a": "1"}, {}]) == {"a": ["1", "(not there)"]}
    long = "x" * 60
    assert labels([{"a": f"{long}1"}, {"a": f"{long}2"}]) == [f"a={'x' * 39}… (1)", f"a={'x' * 39}… (2)"]


def test_short_names() -> None:
    assert short_name("model.init_args.objective.advantage.function") == "objective.advantage"
    assert short_name("data.init_args.train.path") == "data.train.path"
    assert short_name("model.class_path") == "model"
    assert short_value("gopo_lightning.objectives.ClippedSurrogate") == "ClippedSurrogate"
    assert short_value("/data/models/qwen3") == "qwen3" and short_value("Qwen/Qwen3") == "Qwen/Qwen3"
    assert short_value("0.001") == "0.001"


def test_the_baseline_is_grpo_or_what_is_said() -> None:
    def groups(*advantages: str) -> list:
        configs = [{"model": {"init_args": {"advantage": a}}, "seed_everything": 1} for a in advantages]
        return group_runs([Run(Path(a), config, {}, {}) for a, config in zip(advantages, configs, strict=True)])[0]

    assert baseline_of(groups("ordinal", "grpo", "rloo")) == 1
    assert baseline_of(groups("ordinal", "dr_grpo")) == 0
    assert baseline_of(groups("ordinal", "grpo"), "ordinal") == 0
    assert baseline_of(groups("ordinal", "grpo"), "advantage=grpo") == 1
    with pytest.raises(ValueError, match=r"'rl', which 0 of the groups are called. They are: advantage=ordinal; adv"):
        baseline_of(groups("ordinal", "grpo"), "rl")
