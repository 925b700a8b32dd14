"""`predictions.jsonl` holds every row, whatever prompts and rewards hold. (Two ranks: tests/test_cli.py.)"""

import json
from pathlib import Path
from typing import Any

from gopo_lightning.data.sources import PromptSource
from gopo_lightning.rewards import FunctionReward
from tests.runs import make_data, make_module, make_trainer
from tests.test_json_lines import BREAKS, strictly

TEXTS = [f"one{character}two" for character in BREAKS]


def edges(prompts: list[str], completions: list[str]) -> list[float | None]:
    """Every kind of number that a reward may give."""
    return [[1.5, float("inf"), float("-inf"), None][n % 4] for n in range(len(completions))]


def test_every_row_is_written_as_json_in_the_order_of_the_dataset(tiny_policy: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    trainer = make_trainer(tmp_path)
    module = make_module(
        tiny_policy, rewards=[FunctionReward("tests.test_predictions.edges", name="edges")], eval_num_completions=4
    )
    trainer.predict(module, make_data(source, predict=PromptSource(str(source))), return_predictions=False)
    folder = tmp_path / "run" / "version_0"
    *lines, end = (folder / "predictions.jsonl").read_bytes().split(b"\n")
    rows: list[Any] = [strictly(line.decode()) for line in lines]
    assert [row["prompt"] for row in rows] == TEXTS and end == b""
    assert all(row["rewards"] == {"edges": [1.5, "Infinity", "-Infinity", None]} for row in rows)
    assert not list(folder.glob("predictions.rank*"))
