"""A resumed run reads the data that it was started with, or says that it does not."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.data.prompt_dataset import PromptDataset
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.sources import PromptSource, load_rows
from tests.conftest import byte_tokenizer
from tests.runs import make_data, make_module, make_trainer


@pytest.fixture
def prompts(tmp_path: Path, prompts_file: Path) -> Path:
    """A copy of the prompts that may be changed."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_file.read_bytes())
    return path


def first_step(folder: Path, policy: Path, prompts: Path, **data: Any) -> Path:
    """A run of one step and its checkpoint."""
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(make_module(policy), make_data(prompts, **data))
    trainer.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def resume(folder: Path, policy: Path, prompts: Path, **data: Any) -> Trainer:
    trainer = make_trainer(folder)
    trainer.fit(make_module(policy), make_data(prompts, **data), ckpt_path=folder / "first.ckpt")
    return trainer


def edit(path: Path, change: str) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if change == "prompt":
        rows[7]["prompt"] += "!"
    elif change == "column":
        rows[7]["letter"] = "z"
    elif change == "order":
        rows[2], rows[3] = rows[3], rows[2]
    elif change == "added":
        rows.append(rows[0])
    elif change == "removed":
        rows.pop()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("change", ["prompt", "column", "order", "added", "removed"])
def test_changed_data_are_refused_or_warned_about(
    change: str, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    first_step(tmp_path, tiny_policy, prompts, validation=None)
    edit(prompts, change)
    with pytest.raises(ValueError, match=r"train \(.*prompts.jsonl\) differs in .*on_data_change: warn") as error:
        resume(tmp_path, tiny_policy, prompts, validation=None)
    assert ("the number of prompts (12 then" in str(error.value)) is (change in ("added", "removed"))
    with pytest.warns(UserWarning, match="Going on with the new data"):
        assert resume(tmp_path, tiny_policy, prompts, validation=None, on_data_change="warn").global_step == 2


def test_changed_validation_data_are_refused(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    first_step(tmp_path, tiny_policy, prompts)
    with pytest.raises(ValueError, match=r"validation .* the number of prompts \(5 then, 6 now\)"):
        resume(tmp_path, tiny_policy, prompts, validation=PromptSource(str(prompts), limit=6))
    with pytest.raises(ValueError, match="there is no validation data any more"):
        resume(tmp_path, tiny_policy, prompts, validation=None)


def test_another_rendering_is_another_prompt(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    first_step(tmp_path, tiny_policy, prompts)
    with pytest.raises(ValueError, match="the tokens of prompts") as error:
        resume(tmp_path, tiny_policy, prompts, system_prompt="Be brief.")
    assert "the content of rows" not in str(error.value)
    with pytest.raises(ValueError, match=r"what long prompts are cut to \(None then, 8 now\)"):
        resume(tmp_path, tiny_policy, prompts, max_prompt_tokens=8, overlong="truncate_left")


def test_the_same_data_elsewhere_are_the_same(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    """Also with a limit that cuts nothing."""
    first_step(tmp_path, tiny_policy, prompts)
    moved = prompts.rename(tmp_path / "moved.jsonl")
    assert resume(tmp_path, tiny_policy, moved, max_prompt_tokens=100).global_step == 2


def test_a_checkpoint_validates_on_any_data(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    path = first_step(tmp_path, tiny_policy, prompts)
    edit(prompts, "prompt")
    make_trainer(tmp_path).validate(make_module(tiny_policy), make_data(prompts), ckpt_path=path, verbose=False)


class Rows(Callback):
    """The rows of every step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append([prompt.index for prompt in batch["prompts"].prompts])


def order(epoch: int, seed: int = 0) -> list[int]:
    return torch.randperm(12, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def rows_after(folder: Path, policy: Path, prompts: Path, max_steps: int, **data: Any) -> list[list[int]]:
    """Go on from the checkpoint of the first step, and leave that of the last."""
    rows = Rows()
    trainer = make_trainer(folder, max_steps=max_steps, callbacks=[rows], val_check_interval=None)
    trainer.fit(make_module(policy), make_data(prompts, **data), ckpt_path=folder / "first.ckpt")
    trainer.save_checkpoint(folder / "first.ckpt")
    return rows.steps


@pytest.mark.parametrize(
    ("data", "said"),
    [({"prompts_per_step": 3}, "prompts_per_step 4 → 3"), ({"seed": 9}, "seed 0 → 9")],
)
def test_another_order_is_refused(
    data: dict[str, Any], said: str, tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    first_step(tmp_path, tiny_policy, prompts, validation=None)
    with pytest.raises(ValueError, match=f"{said}.*on_data_change: warn"):
        resume(tmp_path, tiny_policy, prompts, validation=None, **data)


def test_with_another_prompts_per_step_no_prompt_is_skipped_or_repeated(
    tiny_policy: Path, prompts: Path, tmp_path: Path
) -> None:
    """Four prompts, then steps of two, resumed once more on the way: two epochs of twelve."""
    first_step(tmp_path, tiny_policy, prompts, validation=None)
    smaller: dict[str, Any] = {"validation": None, "prompts_per_step": 2}
    with pytest.warns(UserWarning, match="prompts_per_step 4 → 2. Going on after the 4 prompts that epoch 0 has read"):
        rows = rows_after(tmp_path, tiny_policy, prompts, 4, **smaller, on_data_change="warn")
    rows += rows_after(tmp_path, tiny_policy, prompts, 11, **smaller)  # which is no change any more
    assert [row for step in rows for row in step] == order(0)[4:] + order(1)


def test_another_seed_begins_a_new_epoch(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    first_step(tmp_path, tiny_policy, prompts, validation=None)
    with pytest.warns(UserWarning, match="seed 0 → 9. Going on with the new data, .* the beginning of epoch 1"):
        rows = rows_after(tmp_path, tiny_policy, prompts, 4, validation=None, seed=9, on_data_change="warn")
    assert [row for step in rows for row in step] == order(1, seed=9)


def test_every_process_gets_the_same_fingerprint(prompts: Path) -> None:
    """Python's own hash differs from process to process; these values were taken in another one."""
    source = PromptSource(str(prompts))
    dataset = PromptDataset(load_rows(source), PromptRenderer(byte_tokenizer(), source))
    assert dataset.fingerprint == {
        "path": str(prompts),
        "num_prompts": 12,
        "rows": "3b5601ecb495f241e5ba5f11102602907bbbc2b764305f6e5874917aee48e62d",
        "tokens": "9380d79eaae399275b1f70365481af0fb71624d41791fac1245cdfc75123b387",
        "cut_to_tokens": None,
    }


def test_a_digest_is_of_content() -> None:
    def digest(*values: Any) -> str:
        result = Digest()
        for value in values:
            result.add(value)
        return result.value

    assert digest({"a": 1, "b": "x"}) == digest({"b": "x", "a": 1})
    assert len({digest("ab"), digest("a", "b"), digest("b", "a"), digest(["ab"]), digest()}) == 5
    assert digest({"day": datetime.date(2026, 1, 1)}) != digest({"day": datetime.date(2026, 1, 2)})
    assert digest({"image": object()}) == digest({"image": object()})  # no address of this process
    assert digest("\ud800") != digest("\ud801")


def test_preferences_are_fingerprinted_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fingerprints(seed: int = 0) -> dict[str, Any]:
        data = PreferenceDataModule(str(path), batch_size=2, seed=seed)
        data.setup("fit")
        return data.state_dict()["fingerprints"]

    before = fingerprints()
    assert fingerprints() == before and before["train"]["num_rows"] == 9
    assert fingerprints(seed=1)["train"] != before["train"]  # another split
    rows[4]["rejected"] += "?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fingerprints() != before


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
