"""LightningCLI in subclass mode: model and data are named by class path, everything else is Lightning's own."""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import transformers
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gopo_lightning._compat import CommandLine, lists_are_replaced
from gopo_lightning.commands.class_files import from_here, in_arguments
from gopo_lightning.commands.errors import UsageError
from gopo_lightning.commands.evaluated_run import in_run_of
from gopo_lightning.commands.explained import class_named, explain, no_class
from gopo_lightning.commands.fsdp import as_fsdp2
from gopo_lightning.commands.layers import check_yaml, fields, options
from gopo_lightning.commands.named_configs import resolve
from gopo_lightning.commands.renamed import refuse_old_names
from gopo_lightning.commands.secrets import refuse_secrets
from gopo_lightning.commands.usage import FIELDS
from gopo_lightning.data import preferences  # noqa: F401
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.distributed.checkpoints import last_checkpoint_of, load_checkpoint, searched_folder, step_of
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.objectives.python_files import as_given
from gopo_lightning.training import reward_model  # noqa: F401  (registers the short class names)
from gopo_lightning.training.callbacks.export import Chosen, ExportHF
from gopo_lightning.training.callbacks.standard import with_progress_bar
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.trainer_defaults import trainer_defaults

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_EXPORTS = {
    "export_dir": None,
    "export_every_n_steps": None,
    "export_weights": "last",
    "push_to_hub": None,
    "push_private": True,
}
"""Options of `ExportHF`, in the order of its arguments, with their defaults."""


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raised, not printed: a class within the config has a parser of this kind too."""
        raise UsageError(message) from ex

    def parse_args(  # type: ignore[override]  # of two overloads
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        """Names of packaged configs are files, lists are replaced as a whole, and null is null at any depth:
        jsonargparse hands it from a class to its fields as the text None.
        """
        given = in_arguments(resolve(sys.argv[1:] if args is None else args))
        with from_here(), lists_are_replaced():
            return super().parse_args(
                [re.sub(r"\A(--[\w.]+)=None\Z", r"\1=null", arg) for arg in given], *more, **options
            )

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Classes in files are named by their files."""
        return as_given(super().dump(*args, **kwargs))

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Ends with the commands that show every field, which subclass mode would leave unsaid."""
        return f"{super().format_help(*args, **kwargs)}\n{FIELDS}"


def _help_of_a_nested_class(arguments: Sequence[str]) -> None:
    """Print the fields of the class that ``--model.init_args.….help CLASS`` names, and exit.

    jsonargparse does so where a class is chosen already.
    """
    for option, value in options(arguments):
        if re.fullmatch(r"--(model|data)\.init_args\.[\w.]+\.help", option):
            if (found := class_named(value)) is None:
                raise ValueError(f"{option}: {no_class(value)}")
            parser = ArgumentParser(prog=value, usage="class_path and init_args", add_help=False)
            parser.add_class_arguments(found, "init_args")
            parser.print_help()
            sys.exit(0)


def _root(arguments: Sequence[str]) -> dict[str, Any]:
    """Fields at the top of a config of this command, with the classes whose fields are below them."""
    method = getattr(Trainer, arguments[0], Trainer.fit) if arguments else Trainer.fit
    own = dict.fromkeys(("config", "seed_everything", *_EXPORTS))
    return {"trainer": Trainer, "model": GOPOModule, "data": PromptDataModule, **own} | dict.fromkeys(
        name for name in signature(method).parameters if name in ("ckpt_path", "weights_only", "return_predictions")
    )


class _SaveConfig(SaveConfigCallback):
    """Puts `config.yaml` into the run's own folder. (Lightning's goes where runs meet: W&B's `save_dir`, the cwd.)"""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, by rank 0; that of an evaluation beside the one of the run, not over it."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and not self.already_saved:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            if stage != "fit" and path.exists():
                path = path.with_stem(f"{path.stem}-{TrainerFn(stage).value}")
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class GOPOCommandLine(CommandLine):
    """The command line of ``gopo-lightning``."""

    def __init__(self, *classes: Any, args: Sequence[str] | None = None, **options: Any) -> None:
        self._given = resolve(sys.argv[1:] if args is None else args)
        super().__init__(*classes, args=args, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # of the class itself
        """The one that is called: each has a parser with all fields, which takes its time."""
        found = super().subcommands()
        return {name: skipped for name, skipped in found.items() if name in self._given[:1]} or found

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What cannot be parsed is one sentence."""
        _help_of_a_nested_class(in_arguments(self._given))
        check_yaml(self._given)
        refuse_old_names(self._given)
        try:
            super().parse_arguments(parser, args)
        except UsageError as error:
            raise UsageError(self._explained(error)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--export_dir",
            type=str | None,
            help="where fit writes the trained Hugging Face model or adapter at its end; <run folder>/policy when "
            "null. An earlier export there is replaced; a folder that holds anything else is refused before training",
        )
        parser.add_argument("--export_every_n_steps", type=int | None, help="also export every n optimiser steps")
        parser.add_argument(
            "--export_weights",
            type=Chosen,
            help="which weights fit exports at its end: the last, or those of the best checkpoint by the metric that "
            "a ModelCheckpoint monitors",
        )
        parser.add_argument(
            "--push_to_hub",
            type=str | None,
            help="OWNER/NAME on the hub to which fit also uploads what it exports at its end; the token is HF_TOKEN, "
            "or that of `hf auth login`",
        )
        parser.add_argument("--push_private", type=bool, help="whether that model is private if it has to be made")
        parser.set_defaults(_EXPORTS)

    def before_instantiate_classes(self) -> None:
        """A secret in the config would be saved with the run; `fsdp` is FSDP2."""
        refuse_secrets(self.config.as_dict())
        trainer = self.config.get(str(self.subcommand), self.config).trainer
        trainer.strategy = as_fsdp2(trainer.strategy)

    def instantiate_classes(self) -> None:
        """What a class says of its arguments comes last, not the configuration that jsonargparse puts around it."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            own: BaseException = error
            while own.__cause__ is not None and _raised_by(own) == "jsonargparse":
                own = own.__cause__
            if _raised_by(own) == "jsonargparse":  # one of several kinds was meant, whose error is in the text
                raise UsageError(self._explained(error)) from error
            if _raised_by(own) != __name__.partition(".")[0]:
                raise ValueError(f"the config names what cannot be made: {own}") from own
            raise own from own.__cause__

    def _explained(self, error: Exception) -> str:
        return explain(str(error), self._given, fields(self._given), _root(self._given))

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """With our progress bar, unless there is another or none is wanted."""
        given = self.config_init.get(str(self.subcommand), self.config_init).trainer
        if given.enable_progress_bar is not False and not given.barebones:
            options = {"callbacks": with_progress_bar(given.callbacks), **options}
        return super().instantiate_trainer(**options)

    def before_fit(self) -> None:
        if isinstance(self.model, GOPOModule):
            options = self.config["fit"]
            self.trainer.callbacks.append(ExportHF(*(options[name] for name in _EXPORTS)))  # type: ignore[attr-defined]
        else:
            self._refuse_export_options()
        self._find_checkpoint("fit")

    def _refuse_export_options(self) -> None:
        """They are the policy's; other modules would not know of them."""
        given = [name for name, default in _EXPORTS.items() if self.config["fit"][name] != default]
        if given:
            raise ValueError(
                f"--{given[0]} belongs to a GOPOModule, and this is a {type(self.model).__name__}. A RewardModelModule "
                "takes export_dir, export_weights, push_to_hub and push_private as model.init_args."
            )

    def before_validate(self) -> None:
        self._find_checkpoint("validate")

    def before_test(self) -> None:
        self._find_checkpoint("test")

    def before_predict(self) -> None:
        self._find_checkpoint("predict")

    def _find_checkpoint(self, subcommand: str) -> None:
        """``--ckpt_path last`` is the last whole checkpoint of this run; a file must be whole."""
        options = self.config_init[subcommand]
        named = options.get("ckpt_path")
        if named != "last":
            if named is not None and Path(named).is_file():
                load_checkpoint(Path(named), mmap=True)  # some strategies of Lightning read files by themselves
                self._write_into_run_of(Path(named), subcommand)
            return
        options["ckpt_path"] = path = last_checkpoint_of(self.trainer)
        if path is not None:
            rank_zero_info(f"--ckpt_path last: step {step_of(path)} of this run, {path}")
            self._write_into_run_of(path, subcommand)
            return
        nothing = f"--ckpt_path last: there is no complete checkpoint of this run in {searched_folder(self.trainer)}"
        if subcommand != "fit":
            raise ValueError(f"{nothing}. Name a file, or the logger's save_dir, name and version of the run.")
        rank_zero_info(f"{nothing}, so it starts at step 0")

    def _write_into_run_of(self, checkpoint: Path, subcommand: str) -> None:
        """What an evaluation measures belongs to the run that is evaluated. (A resume begins a new version.)"""
        if subcommand != "fit":
            self.trainer.loggers = in_run_of(checkpoint, self.trainer.loggers, self.config[subcommand].trainer.logger)


def _raised_by(error: BaseException) -> str:
    """The package whose code raised ``error``."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def run(
    args: list[str] | None = None,
    *,
    instantiate_only: bool = False,
    command_line: type[GOPOCommandLine] = GOPOCommandLine,
) -> GOPOCommandLine:
    """Parse ``args`` (the command line's if None), build trainer, model and data, and run the subcommand.

    With ``instantiate_only`` there is no subcommand in ``args`` and nothing runs.
    """
    _quieten()
    return command_line(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=_SaveConfig,
        trainer_defaults=trainer_defaults(),
        parser_class=_Parser,
        seed_everything_default=0,
        args=args,
        run=not instantiate_only,
    )


def _quieten() -> None:
    """Leave out what the libraries say at every run and nobody can act on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*does not have many workers.*",  # prompts are tokenised once, in setup
        ".*ModelCheckpoint.? with manual optim.*",  # we count optimiser steps as it expects
        ".*LeafSpec.* is deprecated.*",
        "FSDP2-wrapped module .* returned a view tensor.*",  # nothing here changes logits in place
        ".*sync_dist=True.*",  # values are the same on all ranks when they are logged
        ".*your dataloader is not resumable.*",  # our samplers skip what was seen
        "The following callbacks returned in `LightningModule.configure_callbacks` will override.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
