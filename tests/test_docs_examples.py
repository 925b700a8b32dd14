"""What README, CONTRIBUTING and docs show is run: configs, code; options and links exist; the map is the layout."""

import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.data.json_lines import write_jsonl
from gopo_lightning.objectives import ClippedSurrogate, PairObjective, advantages
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.training.config import ObjectiveConfig, RewardConfig, RolloutConfig, UpdateConfig
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.placement import PlacementConfig
from gopo_lightning.types import Prompt
from scripts.docs.pages import GENERATED, pages
from tests.test_architecture import PACKAGE, PARTS
from tests.test_doors import write_config

PAGE = Path("docs/how-to/configure.md").read_text(encoding="utf-8")
DESIGN = Path("docs/design.md").read_text(encoding="utf-8")
CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def block(language: str, beginning: str) -> str:
    """The only code block of ``language`` that begins so."""
    blocks = [textwrap.dedent(code) for code in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.M)]
    (found,) = [code for code in blocks if code.startswith(beginning)]
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(block("yaml", "trainer:"), encoding="utf-8")
    return path


def instantiate(tiny_policy: Path, folder: Path, *configs: Path) -> GOPOModule:
    flags = [f"--model.init_args.policy.name={tiny_policy}", f"--trainer.default_root_dir={folder}"]
    layers = [f"--config={path}" for path in configs]
    module = run([*layers, "--trainer.accelerator=cpu", *flags], instantiate_only=True).model
    assert isinstance(module, GOPOModule)
    return module


def test_the_config_has_all_groups_and_is_instantiated(config: Path, tiny_policy: Path, tmp_path: Path) -> None:
    groups = yaml.safe_load(config.read_text())["model"]["init_args"]
    assert list(groups) == ["policy", "rollout", "rewards", "objective", "update", "placement"]
    module = instantiate(tiny_policy, tmp_path, config)
    assert module.reward_names == ["finished", "sentiment"] and module.rollout_config.num_completions == 8


def test_what_the_config_calls_a_default_is_one(config: Path, tiny_policy: Path, tmp_path: Path) -> None:
    module = instantiate(tiny_policy, tmp_path, config)
    assert module.loss == type(module.loss)() and module.placement == type(module.placement)()


def test_the_reward_of_ones_own(
    config: Path, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python", "def short_answer"))
    monkeypatch.syspath_prepend(str(tmp_path))
    overlay = tmp_path / "overlay.yaml"
    groups = yaml.safe_load(block("yaml", "rewards:"))
    overlay.write_text(yaml.safe_dump({"model": {"init_args": groups}}))
    (source,) = instantiate(tiny_policy, tmp_path, config, overlay).collector.sources
    prompts = [Prompt(index=0, token_ids=(1,), text="", columns={"gold": "4"})] * 3
    assert source(prompts, ["4 ", "5", " "]) == [1.0, 0.0, None]


def test_the_python_code_trains(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + {n} = ", "gold": str(2 * n)} for n in range(8)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = block("python", "from lightning.pytorch").replace("packaged:smollm2-135m-instruct", str(tiny_policy))
    names: dict[str, Any] = {}
    exec(block("python", "def short_answer") + code.replace("max_steps=20", "max_steps=1"), names)
    assert names["module"].trainer.global_step == 1


def test_every_advantage_is_named() -> None:
    paragraph = PAGE[PAGE.index("Advantages that read the order alone") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == advantages.KIND.known.keys()


def test_the_map_is_the_layout() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", DESIGN[DESIGN.index("## The package") :], re.M)
    assert [name for name, _ in rows] == PARTS
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        *PARTS,
        "__init__",
        "__main__",
    }


GROUPS = {
    "policy": PolicyConfig,
    "rollout": RolloutConfig,
    "rewards": RewardConfig,
    "objective": ObjectiveConfig,
    "update": UpdateConfig,
    "placement": PlacementConfig,
}


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").rglob("*.md")), *CONFIGS], ids=str)
def test_options_that_are_named_exist(page: Path) -> None:
    """As flags, and by group: `update.max_grad_norm`."""
    text = page.read_text(encoding="utf-8")
    flags = re.findall(r"--model\.init_args\.(\w+)(?:\.(\w+))?", text)
    named = re.findall(rf"`(?:model\.init_args\.)?({'|'.join(GROUPS)})\.(\w+)", text)
    for group, field in [*flags, *named]:
        if group not in ("seed", "on_setting_change"):
            assert field in {"", *(f.name for f in fields(GROUPS[group]))}, f"{group}.{field}"


def test_links_lead_somewhere() -> None:
    generated = {Path("docs", page).resolve() for page in GENERATED}
    for page in pages():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in generated, f"{page}: {target}"


METHODS = Path("docs/methods.md").read_text(encoding="utf-8")


def fragments(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.M)


@pytest.mark.parametrize("fragment", fragments(METHODS))
def test_each_method_of_the_docs_trains(fragment: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    if "RecordedEngine" in fragment:
        prompts_file = tmp_path / "answers.jsonl"
        answers = {"completions": ["ab", "b", "", "c"], "ranks": [1, 2, 3, 4]}
        write_jsonl(prompts_file, [{"prompt": f"say {i}", **answers} for i in range(12)])
    config = write_config(tmp_path, tiny_policy, prompts_file, yaml.safe_load(fragment))
    assert run(["fit", "--config", str(config)]).model.trainer.global_step == 2


@pytest.mark.parametrize("fragment", fragments(Path("docs/rewards.md").read_text(encoding="utf-8")))
def test_each_config_of_the_page_on_rewards_is_instantiated(
    fragment: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    groups = yaml.safe_load(fragment)
    model = run(
        ["--config", str(write_config(tmp_path, tiny_policy, prompts_file, groups))], instantiate_only=True
    ).model
    assert len(model.reward_names) == len(groups.get("rewards", {"sources": [None]})["sources"])


CONTRIBUTING = Path("CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("fragment", fragments(CONTRIBUTING))
def test_the_methods_that_contributors_are_shown_train(
    fragment: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING, re.DOTALL | re.M)
    (tmp_path / "my_methods.py").write_text("\n\n".join(code), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = write_config(tmp_path, tiny_policy, prompts_file, yaml.safe_load(fragment))
    assert run(["fit", "--config", str(config)]).model.trainer.global_step == 2


def test_the_files_that_contributors_are_to_open_are_there() -> None:
    named = re.findall(r"`((?:objectives|rewards|rollout)/[\w/]+\.py)`", CONTRIBUTING)
    assert len(named) == 10 and all((PACKAGE / path).is_file() for path in named)


def test_every_option_of_the_loss_is_in_the_docs() -> None:
    section = METHODS[METHODS.index("## Loss") : METHODS.index("## Pairs and lists")]
    first_cells = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", first_cells)) == {option.name for option in fields(ClippedSurrogate)}
    pairs = METHODS[METHODS.index("## Pairs and lists") : METHODS.index("## Mirror descent")]
    assert {option.name for option in fields(PairObjective)} <= set(re.findall(r"`(\w+)`", pairs))


def test_every_method_has_a_row_in_the_docs() -> None:
    shipped = {path.name for path in Path("configs/methods").iterdir()}
    rows = " ".join(line for line in METHODS.splitlines() if line.startswith("|"))
    assert shipped <= set(re.findall(r"`(\w+\.yaml)`", rows))
