"""Every shipped YAML is parsed and instantiated, alone or in layers, with the models swapped for tiny ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from allpairspy import AllPairs
from lightning.pytorch import LightningModule

from gopo_lightning.commands.lightning_cli import run
from tests.golden.configs import CONFIGS, is_whole

WHOLE = [path for path in sorted(CONFIGS.rglob("*.yaml")) if is_whole(path)]
POLICIES = [path for path in WHOLE if not path.stem.startswith("reward_model")]
TASKS = [path for path in POLICIES if path.parent.name == "paper"]
LAYERS = [[None, *sorted((CONFIGS / name).iterdir())] for name in ("advantage", "strategy", "engine", "debug")]
"""One of each, or none, goes on a task, in this order."""
STACKS = [[path for path in stack if path is not None] for stack in AllPairs([TASKS, *LAYERS])]
"""In which every two files of different layers meet."""


METHODS = sorted((CONFIGS / "methods").iterdir())


def named(layers: list[Path]) -> str:
    """Of a test."""
    return "+".join(path.stem for path in layers)


@pytest.mark.parametrize("path", POLICIES, ids=str)
def test_policy_configs_are_instantiated(path: Path, tiny_policy: Path, tmp_path: Path) -> None:
    logger = f"--trainer.logger.init_args.save_dir={tmp_path}"
    module = instantiate([path], logger, f"--model.init_args.policy.name={tiny_policy}")
    module.configure_model()
    assert module.policy.config.hidden_size == 32


@pytest.mark.parametrize("path", [path for path in WHOLE if path not in POLICIES], ids=str)
def test_reward_model_configs_are_instantiated(path: Path) -> None:
    instantiate([path])


@pytest.mark.parametrize("layers", STACKS, ids=named)
def test_layers_are_instantiated_together(layers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what each of them sets; vLLM need not be installed, and FSDP1 has another name on CPUs."""
    monkeypatch.setattr("gopo_lightning.rollout.engines.vllm_start.find_spec", lambda name: True)
    fsdp1 = ["--trainer.strategy=fsdp_cpu"] if Path("configs/strategy/fsdp.yaml") in layers else []
    module = instantiate(layers, f"--trainer.logger.init_args.save_dir={tmp_path}", *fsdp1)
    for path in layers:
        if path.parent.name == "advantage":
            assert module.objective_config.advantage == init_args(path)["objective"]["advantage"]
        if path.stem == "smoke":
            assert module.sampling.max_new_tokens == 16
        if path.parent.name == "engine":
            engine = {"vllm": "VLLMEngine", "vllm_server": "VLLMServerEngine"}[path.stem]
            assert type(module.collector.engine).__name__ == engine


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_a_method_is_laid_on_tasks_and_baselines(path: Path, tmp_path: Path) -> None:
    """Whatever loss and advantage they have: nothing of them is left that the method would not read."""
    task = TASKS[METHODS.index(path) % len(TASKS)]
    for below in ([task], [task, CONFIGS / "advantage" / "dr_grpo.yaml"]):
        module = instantiate([*below, path], f"--trainer.logger.init_args.save_dir={tmp_path}")
        objective = init_args(path).get("objective", {})
        if loss := objective.get("loss"):
            assert type(module.loss).__name__ == class_name(loss)
            assert {name: getattr(module.loss, name) for name in loss["init_args"]} == loss["init_args"]
        for name in objective.keys() & {"advantage", "credit"}:
            assert getattr(module.objective_config, name) == objective[name]
        transforms = init_args(path).get("rewards", {}).get("transforms", [])
        assert [type(each).__name__ for each in module.reward_config.transforms] == [*map(class_name, transforms)]
        sources = init_args(path).get("rewards", {}).get("sources", [])
        if sources:
            assert [type(each).__name__ for each in module.reward_config.sources] == [*map(class_name, sources)]
        assert loss or transforms or sources


def class_name(named: dict[str, Any]) -> str:
    return str(named["class_path"].rpartition(".")[2])


@pytest.mark.parametrize("path", TASKS, ids=str)
def test_no_task_validates_on_what_it_trains_on_or_on_the_prompts_of_the_judge(path: Path) -> None:
    data = yaml.safe_load(path.read_text())["data"]["init_args"]
    train, held_out = data["train"], data["validation"]
    assert train["path"] == held_out["path"] != "google/IFEval"
    ours, theirs = train["split"].partition("["), held_out["split"].partition("[")
    assert "test" not in held_out["split"]
    assert ours[0] != theirs[0] or (ours[2], theirs[2]) == (":-500]", "-500:]")


def test_an_overlay_changes_its_own_part_alone() -> None:
    parts = {"advantage": {"model"}, "methods": {"model"}, "strategy": {"trainer"}, "engine": {"model"}}
    for layer, allowed in parts.items():
        for path in (CONFIGS / layer).iterdir():
            assert yaml.safe_load(path.read_text()).keys() == allowed, path


def test_a_list_is_replaced_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is as long as the earlier one, with the same classes: a reward by another model sees the prompt."""
    sources = init_args(CONFIGS / "quickstart" / "gopo.yaml")["rewards"]["sources"]
    assert sources[1]["init_args"]["include_prompt"] is False
    del sources[1]["init_args"]["include_prompt"]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"rewards": {"sources": sources}}}}))
    with pytest.raises(SystemExit):
        run(["fit", f"--config={CONFIGS / 'quickstart' / 'gopo.yaml'}", f"--config={overlay}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    found = printed["model"]["init_args"]["rewards"]["sources"]
    assert found[1]["init_args"]["include_prompt"] is True and found[1]["init_args"]["name"] == "sentiment"


def test_gopo_and_grpo_of_the_quickstart_differ_in_the_advantage() -> None:
    """And in how several rewards become one: ranks have no magnitude for GRPO to read."""
    gopo, grpo = (yaml.safe_load((CONFIGS / "quickstart" / name).read_text()) for name in ("gopo.yaml", "grpo.yaml"))
    ours, theirs = gopo["model"].pop("init_args"), grpo["model"].pop("init_args")
    assert gopo == grpo
    assert (ours["objective"].pop("advantage"), theirs["objective"].pop("advantage")) == ("ordinal", "grpo")
    assert ours["rewards"].pop("combine") == "lexicographic"
    combine = theirs["rewards"].pop("combine")
    assert combine["function"] == "weighted_sum"
    assert len(combine["init_args"]["weights"]) == len(ours["rewards"]["sources"])
    assert ours == theirs


def init_args(path: Path) -> dict[str, Any]:
    """What a config says of the module."""
    return yaml.safe_load(path.read_text())["model"]["init_args"]


def instantiate(layers: list[Path], *overrides: str) -> LightningModule:
    """The module of a config, without running anything."""
    configs = [f"--config={path}" for path in layers]
    return run([*configs, "--trainer.accelerator=cpu", *overrides], instantiate_only=True).model
