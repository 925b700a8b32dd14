"""Tables and histograms in every logger, each library as it is installed, offline."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gopo_lightning.data.comparison_batches import Comparisons
from gopo_lightning.training.callbacks import PairTable, SampleTable
from gopo_lightning.training.callbacks.pairs import worst_pairs
from gopo_lightning.training.callbacks.samples import group_cells, group_table
from gopo_lightning.training.loggers import log_histogram
from tests.runs import make_data, make_module, make_trainer
from tests.test_callbacks import NAN, Module, experience, loader, trainer

COLUMNS = ["row", "prompt", "rank", "reward", "advantage", "tokens", "cut", "completion"]
HELD_OUT = ["row", "prompt", "rank", "reward", "tokens", "cut", "completion"]
TABLES = {"samples/group_0": COLUMNS, "val/samples/group_0": HELD_OUT, "val/samples/group_1": HELD_OUT}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, prompts_file: Path) -> Iterator[Path]:
    """A run of two steps with four loggers at a time: `tb`, `csv`, `wandb` and `mlruns`."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        loggers = [
            TensorBoardLogger(str(folder), name="tb", version="v"),
            CSVLogger(str(folder), name="csv", version="v"),
            WandbLogger(project="p", name="run", save_dir=str(folder)),
            MLFlowLogger("experiment", tracking_uri=f"file:{folder}/mlruns"),
        ]
        tables = SampleTable(every_n_steps=1, num_groups=1)
        run = make_trainer(folder, logger=loggers, callbacks=[tables], enable_checkpointing=False)
        run.fit(make_module(tiny_policy), make_data(prompts_file))
        loggers[2].experiment.finish()
        yield folder


def in_csv(folder: Path) -> dict[str, list[list[str]]]:
    """Header and rows of each table of the CSV logger."""
    files = {tag: folder / "csv" / "v" / f"{tag}.csv" for tag in TABLES}
    return {tag: list(csv.reader(io.StringIO(path.read_text(), newline=""))) for tag, path in files.items()}


def test_csv_has_a_file_of_each_table_and_quantiles_as_metrics(runs: Path) -> None:
    tables = in_csv(runs)
    for tag, columns in TABLES.items():
        header, *rows = tables[tag]
        assert header == ["step", *columns]
        assert [row[0] for row in rows] == (["1"] * 4 + ["2"] * 4 if tag.startswith("s") else ["0"] * 2 + ["2"] * 2)
    with (runs / "csv" / "v" / "metrics.csv").open() as file:
        medians = [row["advantage/histogram/median"] for row in csv.DictReader(file)]
    assert sum(value != "" for value in medians) == 2


def test_tensorboard_has_them_as_text(runs: Path) -> None:
    (file,) = (runs / "tb" / "v").glob("events*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    for tag in TABLES:
        steps = [1, 2] if tag.startswith("s") else [0, 2]
        assert [event.step for event in events.Tensors(f"{tag}/text_summary")] == steps
    assert [event.step for event in events.Histograms("advantage/histogram")] == [1, 2]
    first = events.Tensors("val/samples/group_1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert first.startswith("**Prompt, row 1:** say abab") and "advantage" not in first


def test_mlflow_has_an_artifact_of_each_table_and_quantiles_as_metrics(runs: Path) -> None:
    (artifacts,) = (runs / "mlruns").glob("*/*/artifacts")
    tables = in_csv(runs)
    for tag in TABLES:
        rows = [
            [str(int(path.stem.removeprefix("step-"))), *row]
            for path in sorted((artifacts / tag).iterdir())
            for row in list(csv.reader(io.StringIO(path.read_text(), newline="")))[1:]
        ]
        assert rows == tables[tag][1:]
    lines = (artifacts.parent / "metrics" / "advantage" / "histogram" / "q75").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["1", "2"]


def test_wandb_has_tables_and_histograms(runs: Path) -> None:
    (files,) = (runs / "wandb").glob("offline-run-*/files")
    found = {tag: sorted((files / "media" / "table" / tag).parent.glob(f"{Path(tag).name}_*.json")) for tag in TABLES}
    tables = in_csv(runs)
    for tag, columns in TABLES.items():
        written = [json.loads(path.read_text()) for path in found[tag]]
        assert [table["columns"] for table in written] == [columns] * 2
        texts = {row[-1] for table in written for row in table["data"]}
        assert texts == {row[-1] for row in tables[tag][1:]}
    (log,) = files.parent.glob("*.wandb")
    assert log.read_bytes().count(b'"histogram"') >= 2  # the type of a value, at each step


def test_cells_are_the_numbers_of_the_table_in_its_order() -> None:
    group = experience([[0.5, 2.0, NAN]], texts=("a" * 20, "b", "c"), num_sources=2)
    columns, rows = group_cells(group, 0, ("one", "two"), max_chars=10)
    assert columns == ["row", "prompt", "rank", "reward", "reward one", "reward two", *COLUMNS[4:]]
    assert rows[0] == [7, "Prompt 0", 1.0, 2.0, 2.0, 2.0, 2.0, 2, False, "b"]
    assert rows[1] == [7, "Prompt 0", 2.0, 0.5, 0.5, 0.5, 0.5, 2, True, "a" * 10]
    assert rows[2][2] != rows[2][2] and rows[2][-1] == "c"
    assert group_table(group, 0).index("| b |") < group_table(group, 0).index("| c |")


def test_the_pairs_that_are_most_wrong_come_first(tmp_path: Path) -> None:
    wins_NN = torch.full((5, 5), NAN)
    for better, worse in ((0, 1), (2, 1), (3, 2), (4, 0)):  # the last is padding
        wins_NN[better, worse], wins_NN[worse, better] = 1.0, 0.0
    chat = ({"role": "user", "content": "hi | there"},)
    batch = Comparisons(("a", "b" * 9, chat, "d", "padding"), wins_NN, num_padding=1)
    scores_N = torch.tensor([1.0, 3.0, 0.5, 4.0, -9.0])
    table = worst_pairs(batch, scores_N, num_pairs=2, max_chars=5)
    assert table.rows == [[-2.5, 1.0, 0.5, 3.0, "user:", "bbbbb"], [-2.0, 1.0, 1.0, 3.0, "a", "bbbbb"]]
    assert table.markdown.splitlines()[2:] == [
        "| -2.500 | +1.000 | +0.500 | +3.000 | user: | bbbbb |",
        "| -2.000 | +1.000 | +1.000 | +3.000 | a | bbbbb |",
    ]
    run, module = trainer(tmp_path, [], logger=CSVLogger(str(tmp_path), name="", version="v")), Module()
    with pytest.raises(ValueError, match="no scored pairs in Module"):
        PairTable().on_validation_batch_end(run, module, None, {}, 0)
    for batch_idx in (0, 1):
        PairTable(num_pairs=1).on_validation_batch_end(run, module, scores_N, batch, batch_idx)
    assert len((tmp_path / "v" / "val" / "pairs.csv").read_text().splitlines()) == 2  # the header and the first


class Other(Logger):
    """A logger that knows metrics alone."""

    name, version = "other", "v"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_logger_without_tables_is_named_and_gets_quantiles(tmp_path: Path) -> None:
    other = Other()
    run = trainer(tmp_path, [SampleTable()], max_steps=1, logger=[other, TensorBoardLogger(tmp_path)])
    with pytest.warns(UserWarning, match="SampleTable writes nothing to Other, which take no tables"):
        run.fit(Module(), loader())
    log_histogram(run, "h", torch.tensor([[4.0, 0.0], [1.0, 3.0]]))
    assert {name: other.metrics[f"h/{name}"] for name in ("min", "median", "max")} == {"min": 0, "median": 2, "max": 4}
