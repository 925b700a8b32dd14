"""`./rewards.py:f`: a name in a file stands wherever a dotted path does, and a run saves it as it was given."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gopo_lightning.commands.class_files import in_arguments, in_value
from gopo_lightning.commands.duel import make_parser
from gopo_lightning.commands.judges import JUDGES, chosen_judge, prepared
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.evaluation.duels.digests import judge_identity
from gopo_lightning.objectives.advantages import get_advantage
from gopo_lightning.objectives.credit import get_credit
from gopo_lightning.objectives.named import load_callable
from gopo_lightning.objectives.python_files import as_given, dotted, file_of
from gopo_lightning.rewards import FunctionReward
from gopo_lightning.types import Prompt
from tests.test_doors import write_config

MINE = '''\
"""Everything that a config can name."""
from dataclasses import replace

from gopo_lightning.objectives import ClippedSurrogate
from gopo_lightning.rewards import RewardSource
from gopo_lightning.rollout import Transform, TransformersEngine

def brevity(completions, bonus=0.0):
    return [bonus - len(text) for text in completions]

def twice(rewards_PG, *, scale=2.0):
    return scale * (rewards_PG - rewards_PG.mean(-1, keepdim=True))

def everywhere(experience, *, share=1.0):
    return None

class Words(RewardSource):
    name = "words"

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def __call__(self, prompts, completions):
        return [self.bonus + len(text.split()) for text in completions]

class Mine(ClippedSurrogate):
    """A loss."""

class Engine(TransformersEngine):
    """An engine."""

class Half(Transform):
    def __call__(self, rollout, context):
        return replace(rollout, rewards_PG=rollout.rewards_PG / 2)
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """my-code.py, no name that could be imported, in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my-code.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("./a.py:f", "./a.py"),
        ("a.py:Class.method", "a.py"),
        ("/x/my code.py:f", "/x/my code.py"),
        ("a.py", None),
        ("a.b.f", None),
        ("a.py:", None),
        ("a.py:1", None),
        ("see a.py: it does", None),
    ],
)
def test_what_names_something_in_a_file(text: str, file: str | None) -> None:
    assert file_of(text) == file


def test_a_file_is_executed_once_and_has_a_module_of_its_own(mine: Path) -> None:
    first, again = load_callable("./my-code.py:brevity"), load_callable(f"{mine}:brevity")
    assert first is again and first(["abc"], bonus=1.0) == [-2.0]
    assert sys.modules[first.__module__].__file__ == str(mine)
    other = mine.parent / "other" / "my-code.py"
    other.parent.mkdir()
    other.write_text("def brevity(completions):\n    return 0\n")
    assert load_callable("other/my-code.py:brevity") is not first


def test_functions_of_every_kind(mine: Path) -> None:
    reward = FunctionReward("./my-code.py:brevity", options={"bonus": 1.0})
    assert reward.name == "brevity" and reward([Prompt(0, (), "p")], ["ab"]) == [-1.0]
    advantage = get_advantage("./my-code.py:twice", scale=3.0)
    assert advantage(torch.tensor([[0.0, 2.0]])).tolist() == [[-3.0, 3.0]]
    assert get_credit("./my-code.py:everywhere", share=0.5)(None) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./no.py:f", r"'./no.py:f': there is no such file in .*Correct the path, or the working folder"),
        ("./my-code.py:no", r"cannot load './my-code.py:no': module 'my_code_at_\w{8}' has no attribute 'no'"),
        ("./needs.py:f", r"needs.py cannot be imported: No module named 'no_such_package'"),
        ("./torn.py:f", r"torn.py cannot be imported: .*was never closed"),
    ],
)
def test_what_cannot_be_loaded(path: str, message: str, mine: Path) -> None:
    Path("needs.py").write_text("import no_such_package")
    Path("torn.py").write_text("f(")
    for _ in range(2):  # a file that failed leaves nothing behind
        with pytest.raises(ValueError, match=message):
            load_callable(path)


def test_an_advantage_of_the_wrong_shape_is_named_with_its_signature(mine: Path) -> None:
    Path("bad.py").write_text("def shapeless(rewards_PG):\n    return rewards_PG.sum()\n")
    with pytest.raises(ValueError, match=r"Its signature is shapeless\(rewards_PG: Tensor"):
        get_advantage("./bad.py:shapeless")(torch.zeros(1, 2))


def test_values_of_configs_and_options(mine: Path) -> None:
    words = dotted("./my-code.py:Words")
    given = {"sources": [{"class_path": "./my-code.py:Words"}, "./my-code.py:Words"], "function": "./my-code.py:f"}
    expected = {"sources": [{"class_path": words}, words], "function": "./my-code.py:f"}
    assert in_value(given) == expected and json.loads(as_given(json.dumps(expected))) == given
    assert in_value("no.py:text") == "no.py:text"
    with pytest.raises(ValueError, match=r"there is no such file in"):
        in_value({"class_path": "no.py:Words"})
    options = ["--a.engine=./my-code.py:Words", "--a.engine", "./my-code.py:Words", "--a.function=./my-code.py:f"]
    assert in_arguments(options) == [f"--a.engine={words}", "--a.engine", words, "--a.function=./my-code.py:f"]


def test_a_run_of_classes_and_functions_in_a_file_saves_what_can_be_run_again(
    mine: Path, tiny_policy: Path, prompts_file: Path
) -> None:
    brevity = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "./my-code.py:brevity"},
    }
    options = {
        "rewards": {
            "sources": [brevity, {"class_path": "./my-code.py:Words", "init_args": {"bonus": 0.5}}],
            "combine": "borda",
            "transforms": [{"class_path": "./my-code.py:Half"}],
        },
        "objective": {
            "advantage": {"function": "./my-code.py:twice", "init_args": {"scale": 1.0}},
            "loss": {"class_path": "./my-code.py:Mine", "init_args": {"clip_high": 0.3}},
        },
    }
    config = write_config(mine.parent, tiny_policy, prompts_file, options)
    engine = "--model.init_args.rollout.engine=./my-code.py:Engine"
    module = run(["fit", "--config", str(config), engine]).model
    assert module.reward_names == ["brevity", "words"] and module.trainer.global_step == 2
    assert (type(module.loss).__name__, module.loss.clip_high) == ("Mine", 0.3)
    assert type(module.collector.engine).__name__ == "Engine"
    saved = mine.parent / "run" / "a" / "config.yaml"
    text = saved.read_text()
    assert "class_path: ./my-code.py:Engine" in text and "_at_" not in text
    assert yaml.safe_load(text)["model"]["init_args"]["objective"]["advantage"]["function"] == "./my-code.py:twice"
    again = run(["fit", "--config", str(saved)]).model
    assert again.reward_names == module.reward_names and type(again.loss) is type(module.loss)


def test_a_judge_in_a_file_is_known_by_its_content(mine: Path) -> None:
    Path("judge.yaml").write_text("{class_path: './my-code.py:Words', init_args: {bonus: 0.5}}")
    parser = make_parser(JUDGES)
    for given in (["--judge", "judge.yaml"], ["--judge", "./my-code.py:Words", "--judge.bonus=0.5"]):
        arguments, _, sources = prepared(given)
        judge, config = chosen_judge(parser, parser.parse_args(arguments), sources, None)
        assert judge([], ["a b"]) == [2.5] and config["class_path"] == "./my-code.py:Words"
    before = judge_identity(config)
    mine.write_text(MINE.replace("len(text.split())", "1"))
    assert judge_identity(config) != before
