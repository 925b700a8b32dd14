"""``predict`` writes JSONL: one line a prompt, in the order of the dataset, on any number of ranks."""

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from gopo_lightning.data.json_lines import dumps, read_jsonl, write_jsonl
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.types import Rollout


def prediction_records(rollout: Rollout, is_padding_P: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """A record per prompt: completions, rewards by source, token counts, finish reasons (`stop` or `length`)."""
    G, completions = rollout.group_size, rollout.completions
    lengths_PG = completions.lengths_N.reshape(-1, G).tolist()
    truncated_PG = completions.truncated_N.reshape(-1, G).tolist()
    return [
        {
            "index": prompt.index,
            "prompt": prompt.text,
            "messages": None if prompt.messages is None else [dict(message) for message in prompt.messages],
            "completions": list(completions.texts[p * G : (p + 1) * G]),
            "rewards": {name: rollout.rewards_PGK[p, :, k].tolist() for k, name in enumerate(names)},
            "num_tokens": lengths_PG[p],
            "finish_reasons": ["length" if truncated else "stop" for truncated in truncated_PG[p]],
        }
        for p, prompt in enumerate(rollout.prompts.prompts)
        if not is_padding_P[p]
    ]


class PredictionWriter(BasePredictionWriter):
    """Each rank appends to a shard of its own; rank 0 merges them into ``predictions.jsonl`` in the run folder.

    Where that is the run of the checkpoint, they go to ``step<n>/predictions.jsonl`` in it (``step<n>-2`` and so on if
    there are some of that step already).
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(_folder(trainer, pl_module))))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shard(trainer.global_rank).write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self._shard(trainer.global_rank).open("a", encoding="utf-8") as file:
            file.writelines(dumps(record) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        shards = [self._shard(rank) for rank in range(trainer.world_size)]
        rows = sorted((row for shard in shards for row in read_jsonl(shard)), key=lambda row: row["index"])
        path = self._folder / "predictions.jsonl"
        write_jsonl(path, rows)
        for shard in shards:
            shard.unlink()
        print(f"{len(rows)} predictions in {path}")

    def _shard(self, rank: int) -> Path:
        return self._folder / f"predictions.rank{rank}.jsonl"


def _folder(trainer: Trainer, module: LightningModule) -> Path:
    """A collective."""
    run, checkpoint = run_folder(trainer), trainer.ckpt_path
    if not checkpoint or not Path(checkpoint).resolve().is_relative_to(run.resolve()):
        return run
    name = f"step{cast(Any, module).logged_step}"
    names = chain([name], (f"{name}-{k}" for k in count(2)))
    return next(run / name for name in names if not (run / name / "predictions.jsonl").exists())
