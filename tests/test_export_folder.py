"""An export replaces an export that nobody has changed, and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gopo_lightning.training.export_folder import LISTING, check_export_folder, write_export


def fill(text: str) -> Callable[[Path], None]:
    """Writes an export of a file and one in a sub-folder."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text(text)

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def thesis(folder: Path) -> None:
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1.txt").write_text("years of work")


def another_model(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


def notes_in_an_export(folder: Path) -> None:
    write_export(folder, fill("old"))
    (folder / "notes.md").write_text("compared with the other one")


def empty_folder_in_an_export(folder: Path) -> None:
    write_export(folder, fill("old"))
    (folder / "mine").mkdir()


def link_in_an_export(folder: Path) -> None:
    write_export(folder, fill("old"))
    (folder / "model.safetensors").rename(folder.parent / "kept")
    (folder / "model.safetensors").symlink_to(folder.parent / "kept")


def tuned_on(folder: Path) -> None:
    write_export(folder, fill("old"))
    (folder / "model.safetensors").write_text("new")  # of the same size


def listing_that_lies(folder: Path) -> None:
    folder.mkdir()
    (folder / "chapter1.txt").write_text("years of work")
    (folder / LISTING).write_text(json.dumps({"chapter1.txt": "0" * 64}))


def unreadable_listing(folder: Path) -> None:
    folder.mkdir()
    (folder / LISTING).write_text("{")


def a_file(folder: Path) -> None:
    folder.write_text("years of work")


FOREIGN = [
    thesis,
    another_model,
    notes_in_an_export,
    empty_folder_in_an_export,
    link_in_an_export,
    tuned_on,
    listing_that_lies,
    unreadable_listing,
    a_file,
]


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_no_unchanged_export_is_refused_and_never_touched(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    make(folder)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)--export_dir=.*policy: it.*[Mm]ove this one away"):
        check_export_folder(folder, "--export_dir")
    assert write_export(folder, fill("new")) == tmp_path / "policy-2"  # what was trained is not lost
    assert before.items() <= tree(tmp_path).items()
    assert (tmp_path / "policy-2" / "model.safetensors").read_text() == "new"
    assert write_export(folder, fill("newer")) == tmp_path / "policy-2"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "kept") == ["policy", "policy-2"]


@pytest.mark.parametrize("there", ["nothing", "empty folder", "export", "part of an export", "copy of an export"])
def test_an_export_takes_the_place_of_one(there: str, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    if there == "empty folder":
        folder.mkdir()
    elif there != "nothing":
        write_export(folder, fill("old"))
    if there == "part of an export":
        (folder / "model.safetensors").unlink()
    if there == "copy of an export":
        os.utime(folder / "model.safetensors", (0, 0))
    check_export_folder(folder, "--export_dir")
    assert write_export(folder, fill("new")) == folder
    assert (folder / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_listing_deletes_nothing_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    write_export(tmp_path / "policy", fill("old"))
    listed = json.loads((tmp_path / "policy" / LISTING).read_text())
    (tmp_path / "policy" / LISTING).write_text(json.dumps({**listed, "../thesis.txt": "0" * 64}))
    write_export(tmp_path / "policy", fill("new"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "policy").symlink_to(tmp_path / "disk" / "policy")
    for text in ("old", "new"):
        write_export(tmp_path / "policy", fill(text))
        assert (tmp_path / "policy").is_symlink()
        assert (tmp_path / "disk" / "policy" / "model.safetensors").read_text() == text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made in .*file"):
        check_export_folder(tmp_path / "file" / "policy", "--export_dir")
    mount = Path("/proc")
    with pytest.raises(ValueError, match="--export_dir=/proc"):
        check_export_folder(mount, "--export_dir")


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    write_export(tmp_path / "policy", fill("old"))

    def fail(folder: Path) -> None:
        fill("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_export(tmp_path / "policy", fail)
    assert (tmp_path / "policy" / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    """safetensors 0.8 lets nobody but the owner read the file it writes; a server runs as somebody else."""

    def write(folder: Path) -> None:
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")

    folder = write_export(tmp_path / "export", write)
    (tmp_path / "plain.txt").write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain.txt").stat().st_mode}
