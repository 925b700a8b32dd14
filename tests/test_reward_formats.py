"""One config, another data set: each format of docs/data.md trains a reward model from the command line."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.data import comparison_formats
from gopo_lightning.rewards import SequenceClassifierReward
from gopo_lightning.rewards import shared_scoring as scoring
from tests.conftest import save_llama
from tests.test_comparisons import BAD, FORMATS, GOOD
from tests.test_rewards import prompt

CONFIG = "configs/quickstart/reward_model_pairs.yaml"


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama over bytes, as a base model would be given; its head does not exist yet."""
    return save_llama(tmp_path_factory.mktemp("causal_lm"), max_position_embeddings=128)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_one_change_of_the_config(
    name: str,
    causal_lm: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first flag is the change; the others make it small. Accuracy is printed, and the folder scores."""
    shared: list[int] = []
    forward = scoring.shared_scores
    monkeypatch.setattr(scoring, "shared_scores", lambda *args: (shared.append(1), forward(*args))[1])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(FORMATS[name](i)) + "\n" for i in range(48)))
    small = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", "max_steps": 30, "val_check_interval": 15},
        "trainer.logger.init_args": {"save_dir": tmp_path},
        "model.init_args": {"model": causal_lm, "max_length": 128, "export_dir": tmp_path / "export"},
        "model.init_args.optimizer.init_args": {"lr": 0.003},
        "data.init_args": {"batch_size": 8, "validation_fraction": 0.25},
    }
    flags = [f"--{group}.{key}={value}" for group, values in small.items() for key, value in values.items()]
    with caplog.at_level(logging.INFO):
        run(["fit", "--config", CONFIG, f"--data.init_args.source={file}", *flags])
    printed = [float(x) for x in re.findall(r"held-out data: .*pair_accuracy_all (\d\.\d+)", caplog.text)]
    assert len(printed) == 2 and printed[-1] == 1.0
    assert len(shared) > 30  # the prompt of a pair or list was forwarded once
    source = SequenceClassifierReward(str(tmp_path / "export"), template="chat" if name == "ultrafeedback" else "plain")
    source.setup(torch.device("cpu"))
    good, bad = source([prompt("q99 ")] * 2, [GOOD, BAD])
    assert good > bad


def test_the_documents_name_every_format() -> None:
    formats, reference = Path("docs/data.md").read_text(), Path("docs/rewards.md").read_text()
    for known in comparison_formats.FORMATS:
        columns = ", ".join(f"`{column}`" for column in known.columns)
        assert columns in formats, columns
        assert columns in reference, columns
    for column in (*comparison_formats.PROMPTS, *comparison_formats.SYSTEMS, *comparison_formats.RATINGS):
        name = column if isinstance(column, str) else f"{column[0]}`, `{column[1]}"
        assert f"`{name}`" in reference, name
