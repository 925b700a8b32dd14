"""The report on a GPU: it goes on after whatever a part does, and ends in time. (Its numbers need a GPU.)"""

import os
import sys
import time
from pathlib import Path

import pytest

from scripts import gpu_report
from scripts.gpu_report import Part


def python(code: str, **options: float | tuple[str, ...]) -> Part:
    return Part("a", [sys.executable, "-c", code], seconds=0.5, **options)  # type: ignore[arg-type]


def test_what_a_part_may_do() -> None:
    assert gpu_report.run(python("print(1); print(); print(2)"), 60)["output"] == ["1", "2"]
    failed = gpu_report.run(python("raise SystemExit('no such device')"), 60)
    assert (failed["status"], failed["error"]) == ("failed with status 1", ["no such device"])
    assert gpu_report.run(python("", packages=("no_such_package",)), 60) == {
        "status": "left out: no_such_package not installed"
    }
    assert gpu_report.run(python(""), 0.1)["status"].startswith("left out: about 0 s, and 0 are left")


def test_a_part_is_stopped_with_all_that_it_has_started(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_report.run(python(code), 3)["status"] == "stopped after 3 s"
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


@pytest.mark.parametrize("gpu", [True, False])
def test_every_part_has_its_file(gpu: bool, tmp_path: Path) -> None:
    for part in gpu_report.parts(tmp_path, tmp_path, gpu=gpu, quick=not gpu):
        files = [word for word in part.command if word.endswith(".py")]
        assert files and all((gpu_report.ROOT / file).exists() for file in files), part.name


def test_the_table_names_what_was_left_out() -> None:
    report = {
        "device": {"gpu": "X"},
        "parts": {"a": {"status": "left out: trl not installed"}, "b": {"status": "done"}},
    }
    assert "| a | left out: trl not installed |  |" in gpu_report.markdown(report)
