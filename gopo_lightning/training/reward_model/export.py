"""A trained reward model as a Hugging Face folder, with the τ of its held-out pairs and a model card."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.rewards.calibration import Calibration
from gopo_lightning.training.callbacks.export import Chosen
from gopo_lightning.training.export_folder import write_export
from gopo_lightning.training.hub import check_repo


def check_push(push_to_hub: str | None, export_dir: str | None, weights: Chosen) -> None:
    """ValueError for a name that is none on the hub, and for options of an export that there is not."""
    if push_to_hub is not None:
        check_repo(push_to_hub)
    if export_dir is None and (push_to_hub is not None or weights != "last"):
        raise ValueError("push_to_hub and export_weights belong to an export. Set model.init_args.export_dir.")


def export_reward_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    calibration: Calibration | None = None,
) -> Path:
    """Write ``model``, into which an adapter is merged, ``tokenizer``, the README ``card`` and τ; where they are now.

    Raises:
        ValueError: a weight is not finite.
    """
    if unsound := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(
            f"{len(unsound)} weights are not finite, {unsound[0]} among them; nothing is exported. Lower the "
            "learning rate."
        )
    merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model

    def fill(empty: Path) -> None:
        cast(PreTrainedModel, merged).save_pretrained(empty)
        tokenizer.save_pretrained(empty)
        (empty / "README.md").write_text(card, encoding="utf-8")
        if calibration is not None:
            calibration.write(empty)

    return write_export(folder, fill)
