"""Packaged configs by name: a file wins, a misspelt name says what is near, every command takes them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gopo_lightning import __main__
from gopo_lightning.__main__ import main
from gopo_lightning.commands import compare, config, named_configs
from gopo_lightning.commands.named_configs import find, names, purpose, resolve
from gopo_lightning.commands.quickstart import rewards_of

CONFIGS = Path("configs").resolve()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who has just installed the package."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_files(empty: Path) -> None:
    assert {str(CONFIGS / f"{name}.yaml") for name in names()} == set(map(str, CONFIGS.rglob("*.yaml")))
    assert find("quickstart/gopo") == find("quickstart/gopo.yaml") == str(CONFIGS / "quickstart" / "gopo.yaml")


def test_an_installed_package_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gopo_lightning"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "a.yaml").touch()
    monkeypatch.setattr(named_configs.gopo_lightning, "__file__", str(package / "__init__.py"))
    assert find("a") == str(package / "configs" / "a.yaml")


def test_a_file_wins_over_a_name_and_a_folder_does_not(empty: Path) -> None:
    (empty / "quickstart" / "gopo").mkdir(parents=True)
    assert find("quickstart/gopo") == str(CONFIGS / "quickstart" / "gopo.yaml")
    (empty / "quickstart" / "grpo").touch()
    assert find("quickstart/grpo") == "quickstart/grpo"


@pytest.mark.parametrize("text", ["{trainer: {max_steps: 3}}", "trainer:\n  max_steps: 3\n", "/dev/null", "~/no such"])
def test_what_is_no_name_is_left_to_the_parser(text: str) -> None:
    assert find(text) == text


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("quickstart/gop", "quickstart/gopo"),
        ("configs/quickstart/gopo.yaml", "quickstart/gopo"),  # as in a checkout
        ("gopo", "advantage/gopo or quickstart/gopo"),
        ("strategy/fdsp2", "strategy/fsdp2"),
    ],
)
def test_a_misspelt_name_says_what_is_near_and_how_to_list_them(given: str, near: str, empty: Path) -> None:
    with pytest.raises(ValueError, match=rf"config '{given}' is neither .* Do you mean {near}\? `.* config list`"):
        find(given)


def test_a_name_like_no_other(empty: Path) -> None:
    with pytest.raises(ValueError, match=r"packaged config\. `gopo-lightning config list` lists them\.$"):
        find("xyzzy")


def test_every_config_of_a_command_is_resolved() -> None:
    grpo, ddp = (str(CONFIGS / f"{name}.yaml") for name in ("advantage/grpo", "strategy/ddp"))
    given = ["fit", "--config", "advantage/grpo", "-c=strategy/ddp", "--config={}", "--data.config=advantage/grpo"]
    expected = ["fit", "--config", grpo, f"-c={ddp}", "--config={}", "--data.config=advantage/grpo"]
    assert resolve(given) == expected
    assert resolve(["fit", "--config", "--print_config"]) == [
        "fit",
        "--config",
        "--print_config",
    ]  # the parser's to say


def test_compare_has_names_in_its_layers(empty: Path) -> None:
    first, second = compare.layers("paper/tldr+advantage/grpo")
    assert (first, second) == (CONFIGS / "paper" / "tldr.yaml", CONFIGS / "advantage" / "grpo.yaml")
    assert compare.labels(["paper/tldr", "paper/tldr+advantage/grpo"]) == ["tldr", "tldr+grpo"]


def test_the_quickstart_reads_rewards_of_named_configs(empty: Path) -> None:
    sources = yaml.safe_load(rewards_of(["quickstart/gopo", "quickstart/borda"], Path("elsewhere")))
    assert [source["init_args"].get("model") for source in sources][1:2] == ["elsewhere"]


def test_the_command_line_takes_names_and_finds_modules_of_the_working_folder(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the console script starts it: without the working folder on the path."""
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["gopo-lightning", "report", "--config", "advantage/rloo"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(empty))])
    monkeypatch.setattr("gopo_lightning.commands.report.main", lambda arguments: seen.append(list(arguments)))
    __main__.main()
    assert seen == [["--config", str(CONFIGS / "advantage" / "rloo.yaml")]]
    assert sys.path[0] == str(empty)


def test_a_misspelt_name_ends_the_command_in_words(empty: Path) -> None:
    command = [sys.executable, "-m", "gopo_lightning", "fit", "--config", "advantage/rlo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode and "Do you mean advantage/rloo?" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", names())
def test_the_first_line_says_what_a_config_is_for(name: str) -> None:
    first = names()[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") and len(first) <= 120


def test_config_list_has_a_line_for_each(capsys: pytest.CaptureFixture) -> None:
    config.main(["list"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [[name, purpose(file)] for name, file in names().items()]


def test_config_show_prints_the_file(capsys: pytest.CaptureFixture) -> None:
    config.main(["show", "advantage/rloo"])
    assert capsys.readouterr().out == (CONFIGS / "advantage" / "rloo.yaml").read_text()


def test_config_copy_overwrites_nothing(empty: Path, capsys: pytest.CaptureFixture) -> None:
    config.main(["copy", "advantage/rloo", "new/my.yaml"])
    mine = empty / "new" / "my.yaml"
    assert mine.read_text() == (CONFIGS / "advantage" / "rloo.yaml").read_text()
    assert "--config new/my.yaml" in capsys.readouterr().out
    mine.write_text("mine")
    with pytest.raises((ValueError, OSError), match=r"new/my.yaml exists and is left as it is"):
        config.main(["copy", "advantage/grpo", "new/my.yaml"])
    assert mine.read_text() == "mine"
    with pytest.raises((ValueError, OSError), match=r"new is a folder. Name a file in it"):
        config.main(["copy", "advantage/grpo", "new"])


def test_config_says_of_a_name_that_there_is_none(empty: Path) -> None:
    with pytest.raises((ValueError, OSError), match="config 'rloo' is neither .* Do you mean advantage/rloo"):
        config.main(["show", "rloo"])
    with pytest.raises((ValueError, OSError), match="no such file cannot be read"):
        config.main(["show", "no such file"])


def test_the_command_stays_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model card shows it, and a place within an installed package is nobody else's."""
    typed = ["gopo-lightning", "fit", "--config", "quickstart/gopo", "--config=advantage/grpo", "--print_config"]
    monkeypatch.setattr(sys, "argv", [*typed])
    with pytest.raises(SystemExit):
        main()
    assert "advantage: grpo" in capsys.readouterr().out and sys.argv == typed
