"""``gopo-lightning export``: a checkpoint as a Hugging Face folder."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gopo_lightning.commands.errors import Parser

DESCRIPTION = """\
What a checkpoint has trained, as a Hugging Face folder with tokenizer and model card: a policy, the adapter of one,
or a reward model. It needs no GPU, no data and no rewards: of the run's config it reads the model alone.
"""
EXAMPLES = """\
examples:
  gopo-lightning export runs/a/version_0/checkpoints/best.ckpt exports/a
  gopo-lightning export runs/a/version_0 exports/a            # the last checkpoint of the run
  gopo-lightning export runs/lora/version_0 exports/merged --merge_adapter
  gopo-lightning export runs/a/version_0 exports/a --push_to_hub my-name/my-model
"""
_NAME, _DEPTH = "config.yaml", 4


def main(arguments: Sequence[str]) -> None:
    """Export, and say where."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    print(make(options))


def make(options: argparse.Namespace) -> str:
    """Write the export that ``options`` name; what to print.

    Raises:
        ValueError: the checkpoint, the config or the folder is not one that can be taken.
        PushError: the export is there, but not on the hub.
    """
    from gopo_lightning.distributed.checkpoints import step_of
    from gopo_lightning.training.checkpoint_export import export_checkpoint, find_checkpoint
    from gopo_lightning.training.export_folder import check_export_folder
    from gopo_lightning.training.hub import check_repo, push

    if options.push_to_hub is not None:
        check_repo(options.push_to_hub)
    check_export_folder(options.folder, "OUT")
    checkpoint = find_checkpoint(options.checkpoint)
    config = options.config or find_config(checkpoint)
    model = _model_of(config)
    written = export_checkpoint(checkpoint, model, options.folder, merge_adapter=options.merge_adapter)
    said = [f"exported step {step_of(checkpoint)} of {checkpoint} to {written}"]
    if options.push_to_hub is not None:
        address = push(written, options.push_to_hub, private=options.push_private == "true", message="Export")
        said.append(f"pushed to {address}")
    return "\n".join(said)


def find_config(checkpoint: Path) -> Path:
    """The `config.yaml` of the run that wrote ``checkpoint``: in the nearest folder above it that has one.

    Raises:
        ValueError: there is none.
    """
    above = checkpoint.resolve().parents[:_DEPTH]
    found = next((folder / _NAME for folder in above if (folder / _NAME).is_file()), None)
    if found is None:
        raise ValueError(
            f"there is no {_NAME} beside {checkpoint}, as a run leaves it. Name the config of the run by --config."
        )
    return found


def _model_of(config: Path) -> Mapping[str, Any]:
    """`model.init_args` of the file ``config``."""
    from gopo_lightning.evaluation.duels.policies import read_yaml

    values = read_yaml(config)
    model = values.get("model") if isinstance(values, Mapping) else None
    arguments = model.get("init_args") if isinstance(model, Mapping) else None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{config} has no model.init_args, as the config of a run has. Name that one by --config.")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gopo-lightning export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a checkpoint, or a run's folder, of which the last is taken"
    )
    parser.add_argument(
        "folder", type=Path, metavar="OUT",
        help="the folder to write; an earlier export there that nobody has changed is replaced, anything else refused",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="config of the run [config.yaml in a folder above the checkpoint]"
    )
    parser.add_argument(
        "--merge_adapter", action="store_true", help="add a LoRA adapter to its base, and write all weights"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="also upload it; token: HF_TOKEN or `hf auth login`"
    )
    parser.add_argument(
        "--push_private", choices=("true", "false"), default="true",
        help="whether that model is private if it has to be made [true]",
    )  # fmt: skip
    return parser
