"""What must not change unless a change says so: seeded runs to the last bit, and what the shipped configs build."""

import json

import pytest

from tests.golden import configs, runs


def test_seeded_runs_are_the_recorded_ones() -> None:
    """Every loss, metric, sampled text, weight and moment, bit by bit. Remade by `python -m tests.golden.runs`."""
    expected = json.loads(runs.RECORD.read_text())
    actual = runs.record()
    if actual["machine"] != expected["machine"]:
        pytest.skip(f"recorded on {expected['machine']}, but this is {actual['machine']}, which rounds otherwise")
    for name, run in expected["runs"].items():
        assert actual["runs"][name] == run, name


def test_shipped_configs_build_what_is_recorded() -> None:
    """Field by field. Remade by `python -m tests.golden.configs`."""
    expected, actual = json.loads(configs.RECORD.read_text()), configs.record()
    assert sorted(actual) == sorted(expected)
    for path, built in expected.items():
        assert actual[path] == built, path
