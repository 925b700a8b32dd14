"""What is read back from run folders: resumed, torn, broken and real ones."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gopo_lightning.evaluation.event_files import read_run, read_runs
from gopo_lightning.evaluation.run_groups import group_runs
from gopo_lightning.evaluation.sample_tables import parse
from gopo_lightning.evaluation.seed_curves import sampled_tokens
from gopo_lightning.training.callbacks.samples import SampleTable
from tests.event_runs import write_config, write_events, write_run
from tests.runs import make_data, make_module, make_trainer


def test_a_real_run_is_read_as_tensorboard_reads_it(tmp_path: Path, tiny_policy: Path, prompts_file: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SampleTable(every_n_steps=1)])
    trainer.fit(make_module(tiny_policy), make_data(prompts_file))
    run = read_run(Path(trainer.log_dir))
    events = EventAccumulator(str(run.folder))
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"hp_metric", "epoch"}
    assert run.scalars.keys() == tags and len(tags) > 20
    for tag in tags:
        expected = {event.step: event.value for event in events.Scalars(tag)}
        assert run.scalars[tag] == {step: value for step, value in expected.items() if math.isfinite(value)}, tag
    first = run.scalars["completion/length_mean"]
    assert sampled_tokens(run) == {0: 0, 1: 16 * first[1], 2: 16 * (first[1] + first[2])}  # 4 prompts × 4 completions
    table = parse(run.texts["samples/group_0"][2])
    assert table is not None and table.prompt.startswith("say ab") and len(table.samples) == 4
    assert list(run.seconds) == [0, 1, 2] and 0 <= run.seconds[0] < run.seconds[1] < run.seconds[2]


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0, 3: 3.0}, "val/reward": {0: 0.0, 3: 9.0}})
    write_events(tmp_path, {"train/loss": {3: 30.0, 4: 40.0}, "val/reward": {2: 5.0, 4: 6.0}})
    run = read_run(tmp_path)
    assert run.scalars["train/loss"] == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}
    assert run.scalars["val/reward"] == {0: 0.0, 2: 5.0, 4: 6.0}  # that of the abandoned step 3 is gone
    # 0, 1, 2 after 1, 2, 3 seconds; then 2 again, 3 and 4 after 1, 2 and 3 more
    assert list(run.seconds.values()) == pytest.approx([1, 2, 3, 5, 6], abs=0.2)


def test_files_go_on_with_each_other_in_the_order_of_their_seconds(tmp_path: Path) -> None:
    first = write_events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0}})
    second = write_events(tmp_path, {"train/loss": {2: 20.0}})
    first.rename(tmp_path / "events.out.tfevents.999.b.7.0")
    second.rename(tmp_path / "events.out.tfevents.1000.a.3.0")
    assert read_run(tmp_path).scalars["train/loss"] == {1: 1.0, 2: 20.0}


def test_a_run_that_was_begun_again_in_its_folder_is_new(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0}, "val/reward": {0: 7.0}})
    write_events(tmp_path, {"train/loss": {1: 10.0}, "val/reward": {0: 8.0}})
    run = read_run(tmp_path)
    assert run.scalars == {"train/loss": {1: 10.0}, "val/reward": {0: 8.0}}
    assert list(run.seconds.values()) == pytest.approx([1, 2], abs=0.2)


def test_a_later_evaluation_in_the_folder_of_a_run_adds_to_it_and_replaces_nothing(tmp_path: Path) -> None:
    tag = "val/samples/group_0"
    write_events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0}, "val/reward": {0: 7.0}}, {tag: {0: "first"}})
    later = {tag: {0: "second", 1: "third"}}
    write_events(tmp_path, {"val/reward": {0: 8.0, 1: 9.0}, "test/reward": {2: 6.0}}, later)
    scalars = {"train/loss": {1: 1.0, 2: 2.0}, "val/reward": {0: 7.0, 1: 9.0}, "test/reward": {2: 6.0}}
    run = read_run(tmp_path)
    assert run.scalars == scalars and run.texts == {tag: {0: "first", 1: "third"}}


def test_a_resume_in_a_folder_of_its_own_is_the_same_run(tmp_path: Path) -> None:
    for name, steps in (("version_0", {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}), ("version_1", {3: 30.0, 4: 40.0})):
        write_run(tmp_path / name, "grpo", 1, steps)
    groups, notes = group_runs(read_runs([tmp_path])[0])
    (run,) = groups[0].runs.values()
    assert run.scalars["val/reward"] == {0: 0.0, 1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0} and not notes
    assert "version_1 goes on with" in run.notes[-1]


@pytest.mark.parametrize(("start", "runs"), [(24, 1), (28, 2)])
def test_a_resume_is_known_where_not_every_step_is_logged(start: int, runs: int, tmp_path: Path) -> None:
    """Four updates a rollout; a resume begins at most one rollout after the last step."""
    for name, first, last in (("version_0", 4, 20), ("version_1", start, 40)):
        write_run(tmp_path / name, "grpo", 1, {step: float(step) for step in range(first, last + 1, 4)})
    groups, notes = group_runs(read_runs([tmp_path])[0])
    (run,) = groups[0].runs.values()
    assert (4 in run.scalars["val/reward"] and 40 in run.scalars["val/reward"]) == (runs == 1) == (not notes)


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "grpo", 1, {0: 0.0, 1: 1.0, 2: 2.0})
    write_run(tmp_path / "b", "grpo", 1, {0: 0.0, 1: 1.0})
    groups, notes = group_runs(read_runs([tmp_path])[0])
    assert [run.folder.name for run in groups[0].runs.values()] == ["a"]
    assert f"{tmp_path / 'b'} is left out" in notes[0]


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_file_that_was_cut_off_counts_up_to_there(lost: int, tmp_path: Path) -> None:
    file = write_events(tmp_path, {"train/loss": {1: 1.0, 2: 2.0, 3: 3.0}})
    file.write_bytes(file.read_bytes()[:-lost])
    run = read_run(tmp_path)
    assert run.scalars["train/loss"] == {1: 1.0, 2: 2.0}
    assert run.notes == [f"{file.name} ends in the middle of a record; what is before it counts"]


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_damaged_length_ends_the_file(at: int, tmp_path: Path) -> None:
    file = write_events(tmp_path, {"train/loss": {1: 1.0}})
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    run = read_run(tmp_path)
    assert not run.scalars and "ends in the middle" in run.notes[0]


def test_values_that_are_no_numbers_are_left_out_and_said(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": {1: 1.0, 2: math.nan, 3: math.inf, 4: 4.0}})
    run = read_run(tmp_path)
    assert run.scalars["train/loss"] == {1: 1.0, 4: 4.0}
    assert run.notes == ["train/loss: 2 of 4 values are not finite and are left out"]


def test_folders_of_runs_are_opened_and_others_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "seed1", "grpo", 1, {0: 0.0, 1: 1.0})
    write_run(tmp_path / "runs" / "deeper" / "seed2", "grpo", 2, {0: 0.0, 1: 1.0})
    write_events(tmp_path / "runs" / "validated", {"val/reward": {1: 1.0}})
    runs, passed_over = read_runs([tmp_path / "runs", tmp_path / "runs" / "seed1"])
    assert [run.folder.name for run in runs] == ["seed2", "seed1"]
    assert passed_over == [f"{tmp_path / 'runs' / 'validated'} is left out: it trained nothing"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (("empty", "no curves"), ("runs/validated", "trained nothing"), ("file", "a file"),
                         ("missing", "not there")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{tmp_path / name}.* {reason}\. A run folder holds the events.out"):
            read_runs([tmp_path / name])


def test_curves_of_the_csv_logger(tmp_path: Path) -> None:
    write_config(tmp_path, 3)
    (tmp_path / "metrics-1.csv").write_text("epoch,step,train/loss,val/reward\n0,0,,0.5\n0,1,1.0,\n0,2,2.0,\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,2,20.0\n0,3,nan\n0,4")  # killed in a row
    run = read_run(tmp_path)
    assert run.scalars == {"train/loss": {1: 1.0, 2: 20.0}, "val/reward": {0: 0.5}}
    assert run.config["seed_everything"] == 3 and not run.seconds and not sampled_tokens(run)


def test_a_config_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "grpo", 1, {0: 0.0, 1: 1.0})
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system [exit]")
    with pytest.raises(ValueError, match=r"config.yaml cannot be read: .*python/object"):
        read_runs([tmp_path])
    (tmp_path / "config.yaml").write_text("just words")
    assert read_run(tmp_path).config == {}
