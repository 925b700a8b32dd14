"""Does each fault to a small run, goes on with the last checkpoint, and compares the end with an undisturbed run.

A fault is *survived* if the run ends with the same weights and optimiser state, bit for bit; where a fault must stop
it, if it stops with an error that says why, and then goes on. Lost steps are those that had to be done again.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tests.faults.jobs import ctrl_c, peer_death, rank_error
from tests.faults.lab import STEPS, Lab, Row, wait

KILLS = 20
CUTS = 5
FULL_DISKS = 3


def kill_at_random(lab: Lab) -> Row:
    """SIGKILL, 20 times over one run."""
    row, rng = Row("kill -9 at a random moment"), random.Random(0)
    while row.tried < KILLS:
        start, child = lab.step("killed"), lab.fork("killed")
        deadline = time.monotonic() + 60
        while lab.step("killed") == start and time.monotonic() < deadline and row.tried % 2:
            time.sleep(0.01)  # one of two lives makes progress, the other dies wherever it is
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0 or lab.step("killed") == STEPS:
            row.notes.append(f"the run was over after {row.tried} kills")
            break
        row.tried += 1
        row.lost_steps += 1  # every step is saved
    row.notes.append("lost: at most the step under way")
    code = wait(lab.fork("killed"))
    row.survived = row.tried if code == 0 and lab.same_end("killed") else 0
    return row


def torn(lab: Lab) -> Row:
    """The newest checkpoint is cut at a random byte: the one before it is taken."""
    row, rng = Row("checkpoint cut at a random byte"), random.Random(1)
    wait(lab.fork("torn"))
    for _ in range(CUTS):
        row.tried += 1
        path = lab.last("torn")
        assert path is not None
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])
        before = lab.step("torn")
        row.lost_steps += STEPS - before
        row.survived += wait(lab.fork("torn")) == 0 and lab.same_end("torn") and before > 0
    return row


def failing(function: str, fault: str, reason: str, timeout_seconds: float | None = None) -> Callable[[Lab], Row]:
    """A reward source that fails at its fourth call: the run ends with 1, and goes on once it is mended."""

    def run(lab: Lab) -> Row:
        row, start = Row(fault, tried=1), time.monotonic()
        code = wait(lab.fork(function, reward=f"tests.faults.rewards.{function}", timeout_seconds=timeout_seconds))
        kept, seconds, told = lab.step(function), time.monotonic() - start, reason in lab.said(function)
        row.survived = int(code == 1 and told and kept > 0 and wait(lab.fork(function)) == 0 and lab.same_end(function))
        row.notes.append(f"the run ended after {seconds:.0f} s, {'and said why' if told else 'without saying why'}")
        return row

    return run


def nan_scores(lab: Lab) -> Row:
    """Nothing has a score: nothing is learnt, and the run ends well."""
    row = Row("reward is NaN throughout", tried=1)
    code = wait(lab.fork("nan", reward="tests.faults.rewards.all_nan"))
    row.survived = int(code == 0 and lab.step("nan") == STEPS)
    return row


def changed_data(lab: Lab) -> Row:
    """A prompt is edited between save and resume: refused, and gone on with where that is told."""
    row, prompts = Row("dataset file changed before a resume", tried=1), lab.folder / "prompts.jsonl"
    shutil.copy(lab.prompts, prompts)
    interrupted = wait(lab.fork("data", reward="tests.faults.rewards.raises", prompts=prompts))
    kept, content = lab.step("data"), prompts.read_text()
    prompts.write_text(content.replace("say ab", "say AB", 1))
    refused = wait(lab.fork("data", prompts=prompts)), lab.step("data")
    prompts.write_text(content)
    restored = wait(lab.fork("data", prompts=prompts)) == 0 and lab.same_end("data")
    prompts.write_text(content.replace("say ab", "say AB", 1))
    told = wait(lab.fork("data", prompts=prompts, on_data_change="warn"))
    row.survived = int(
        interrupted == 1
        and refused == (1, kept)
        and "Restore the data, or set" in lab.said("data")
        and restored
        and told == 0
    )
    row.notes.append("refused; restored, it ended as undisturbed; on_data_change: warn goes on")
    return row


def full_disk(lab: Lab) -> Row:
    """A disk for two checkpoints and a half: the run ends with 1, both are whole, and with more room it goes on.

    Where no file system may be mounted, files may not grow beyond half a checkpoint instead.
    """
    disk = lab.folder / "disk"
    disk.mkdir()
    whole = lab.last("whole")
    assert whole is not None
    size, num_bytes = whole.stat().st_size, int(2.5 * whole.stat().st_size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(disk)]
    with suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                return _full_tmpfs(lab, disk, num_bytes)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
    return _full_quota(lab, size // 2)


def _full_tmpfs(lab: Lab, disk: Path, num_bytes: int) -> Row:
    row, kept = Row("disk full while saving (tmpfs)"), 0
    for _ in range(FULL_DISKS):
        row.tried += 1
        code, before = wait(lab.fork("disk")), kept
        kept = lab.step("disk")
        row.survived += code == 1 and kept > before and "No space left on device" in lab.said("disk")
        num_bytes += int(0.6 * num_bytes)  # each life has room for its event file and a checkpoint or two
        _resize(disk, num_bytes)
    _resize(disk, 100 * num_bytes)
    row.notes.append(f"stopped with the checkpoints before it whole, the last at step {kept}")
    if wait(lab.fork("disk")) != 0 or not lab.same_end("disk"):
        row.survived = 0
    return row


def _resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def _full_quota(lab: Lab, half: int) -> Row:
    row, kept = Row("disk full while saving (file-size limit)"), 0
    for _ in range(FULL_DISKS):
        child = lab.fork("disk")
        while lab.step("disk") < kept + 2:
            time.sleep(0.01)
        resource.prlimit(child, resource.RLIMIT_FSIZE, (half, half))
        signalled = wait(child)
        row.tried += 1
        row.survived += signalled != 0 and lab.step("disk") >= kept + 2
        kept = lab.step("disk")
    if wait(lab.fork("disk")) != 0 or not lab.same_end("disk"):
        row.survived = 0
    return row


GONE, SLOW = "ConnectionError: the reward server is gone", "has not answered within timeout_seconds=5"
FAULTS = [
    kill_at_random,
    torn,
    full_disk,
    changed_data,
    failing("raises", "reward raises", GONE),
    failing("hangs", "reward hangs", SLOW, timeout_seconds=5),
    failing("miscounts", "reward of the wrong count", "return one number each"),
    nan_scores,
    rank_error("raises_on_rank_1", "reward raises on one rank of two", GONE),
    rank_error("hangs_on_rank_1", "reward hangs on one rank of two", SLOW),
    peer_death("subprocesses"),
    peer_death("torchrun, two nodes"),
    ctrl_c("subprocesses"),
    ctrl_c("torchrun"),
]


def main() -> int:
    """Run all, or those whose numbers are given; 1 if one was not survived."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        assert wait(lab.fork("whole")) == 0, lab.said("whole")
        print(f"{'fault':40} {'tried':>6} {'survived':>9} {'lost steps':>11}")
        good = True
        for number, fault in enumerate(FAULTS):
            if sys.argv[1:] and str(number) not in sys.argv[1:]:
                continue
            row = fault(lab)
            good &= row.survived == row.tried
            print(
                f"{row.fault:40} {row.tried:6} {row.survived:9} {row.lost_steps:11}  {'; '.join(row.notes)}", flush=True
            )
            if row.survived < row.tried:
                for log in lab.folder.glob("*.log"):
                    print(f"--- {log.name}\n{log.read_text()[-1500:]}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
