"""What `ModelCheckpoint` knows of the best checkpoints, in a run that is resumed in a folder of its own."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def keep_best(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let each `ModelCheckpoint` of ``trainer`` take over its state in ``checkpoint``, whatever its folder was.

    (Lightning forgets the scores where the folder is another one, as that of each new version is: the first checkpoint
    after a resume would be the best, however bad. It never deletes a file outside of its own folder, so what was the
    best stays where it is.) Checkpoints that are no longer there do not count. A collective.
    """
    for keeper in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(keeper.state_key)
        if isinstance(keeper, ModelCheckpoint) and state is not None:
            moved = {} if state.get("dirpath") == keeper.dirpath else _moved(keeper, state)
            state.update(trainer.strategy.broadcast(moved))


def _moved(keeper: ModelCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``state`` as ``keeper`` would have written them for the files that there are."""
    best = {path: score for path, score in state.get("best_k_models", {}).items() if Path(path).is_file()}
    fields: dict[str, Any] = {"dirpath": keeper.dirpath, "best_k_models": best}
    if keeper.monitor is None:
        return fields
    order = sorted(best, key=lambda path: float(best[path]), reverse=keeper.mode == "max")
    order = order[: keeper.save_top_k] if keeper.save_top_k > 0 else order
    worst = order[-1] if len(order) == keeper.save_top_k else ""
    return fields | {
        "best_k_models": {path: best[path] for path in order},
        "best_model_path": order[0] if order else "",
        "best_model_score": best[order[0]] if order else None,
        "kth_best_model_path": worst,
        "kth_value": best[worst] if worst else keeper.kth_value,
    }
