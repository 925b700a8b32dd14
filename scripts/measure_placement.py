"""What loading and gathering a sharded policy cost in memory: resident MiB per rank, on CPUs under FSDP2, as a table.

python scripts/measure_placement.py --policy packaged:smollm2-135m-instruct --ranks 2
"""

import argparse
import ctypes
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gopo_lightning.data import assets
from gopo_lightning.distributed.fsdp import shard_fsdp2
from gopo_lightning.distributed.gathering import gathered
from gopo_lightning.policy.model import PolicyConfig, eos_token_ids, load_policy, load_tokenizer
from gopo_lightning.policy.sharded_loading import fill_shards, policy_without_weights
from gopo_lightning.rollout import SamplingConfig, TransformersEngine
from gopo_lightning.types import Prompt, PromptBatch


def resident() -> float:
    """MiB of this process in memory that is no file and that the allocator does not keep for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous()


def anonymous() -> float:
    """MiB of this process in memory that is no file (files that are mapped go as soon as the memory is wanted)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


class Peak:
    """The most that was resident inside beyond what was before, looked at every millisecond: ``mib``."""

    def __enter__(self) -> "Peak":
        self._before, self.mib, self._end = resident(), 0.0, Event()
        self._thread = Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.001):
            self.mib = max(self.mib, anonymous() - self._before)


def load(how: str, config: PolicyConfig, ranks: int) -> nn.Module:
    """The policy, sharded."""
    mesh = init_device_mesh("cpu", (ranks,))
    if how == "whole":
        model: Any = load_policy(config)
        shard_fsdp2(model, mesh, dtype=None)
    else:
        model = policy_without_weights(config)
        shard_fsdp2(model, mesh, dtype=None)
        fill_shards(model, config.name, config.revision, torch.device("cpu"))
    return model


def measure(rank: int, how: str, gather: str, name: str, ranks: int, port: int, folder: str) -> None:
    """One loading and one rollout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=ranks, rank=rank)
    config = PolicyConfig(name)
    tokenizer = load_tokenizer(config)
    start = perf_counter()
    with Peak() as peak:
        model = load(how, config, ranks)
    found = {"load s": perf_counter() - start, "load peak": peak.mib}
    text = "The weather today is"
    prompts = PromptBatch.collate([Prompt(rank, tuple(tokenizer(text)["input_ids"]), text)], tokenizer.pad_token_id)
    empty, start = resident(), perf_counter()
    with Peak() as peak, torch.no_grad(), gathered(model, gather):  # type: ignore[arg-type]
        found["in"] = resident() - empty
        TransformersEngine(prefix_sharing="never").generate(
            model,
            tokenizer,
            prompts,
            2,
            SamplingConfig(temperature=0, max_new_tokens=8 if rank else 4),
            seeds_N=[0, 1],
            eos_token_ids=eos_token_ids(model, tokenizer),
        )
    found |= {"rollout s": perf_counter() - start, "rollout peak": peak.mib}
    found["after"] = resident() - empty
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure in fresh processes, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # of the children: what is freed is gone at once
    assets.resolve(options.policy)  # fetched once
    columns = ["load s", "load peak", "in", "rollout peak", "after", "rollout s"]
    print("| load | rollout_gather | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for how, gather in [("whole", "full"), ("shards", "full"), ("shards", "layer")]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with TemporaryDirectory() as folder:
            mp.spawn(measure, (how, gather, options.policy, options.ranks, port, folder), nprocs=options.ranks)
            found = [torch.load(path) for path in sorted(Path(folder).iterdir())]
        worst = [max(rank[column] for rank in found) for column in columns]
        print(f"| {how} | {gather} | " + " | ".join(f"{value:.1f}" for value in worst) + " |", flush=True)


if __name__ == "__main__":
    main()
