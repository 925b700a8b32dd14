"""Prompts for the policy: sources -> rows -> rendered, checked ``Prompt`` -> batches of this rank."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from gopo_lightning._compat import batches_processed, uses_distributed_sampler
from gopo_lightning.data.batch import collate_with
from gopo_lightning.data.fingerprint import FingerprintedDataModule, OnDataChange
from gopo_lightning.data.prompt_dataset import Limit, Overlong, PromptDataset
from gopo_lightning.data.prompt_stream import PromptStream, StreamPlace, fingerprint
from gopo_lightning.data.rendering import PromptRenderer, Template
from gopo_lightning.data.sampler import InOrderSampler, Place, PromptSampler
from gopo_lightning.data.sources import PromptSource, columns_of, load_rows, stream_rows
from gopo_lightning.types import PromptBatch


class PromptDataModule(FingerprintedDataModule):
    """Serves prompts: ``batch["prompts"]`` is a ``PromptBatch``, ``batch["is_padding"]`` marks repeated rows.

    The tokenizer is that of the module (``module.tokenizer``), there when ``setup`` runs.

    Args:
        train: prompts to train on.
        validation: prompts for validation; none if not given.
        test: prompts for the test subcommand.
        predict: prompts for the predict subcommand.
        prompts_per_step: P, prompts of one training step over ALL ranks; the world size must divide it.
        val_prompts_per_step: the same for validation, test and predict; prompts_per_step if not given.
        system_prompt: a system message put first; it replaces the row's own, if there is one. An empty text is a turn
            without words, which is not the same as null: none.
        apply_chat_template: whether plain strings become a user message: always, never, or auto, which is
            only when system_prompt or chat_template_kwargs is given. Conversations are always rendered by the
            template.
        chat_template_kwargs: passed to the chat template, such as enable_thinking: false.
        max_prompt_tokens: longest prompt, special tokens included; no limit if not given.
        overlong: what happens to a longer one: error, drop, or truncate_left, which keeps a BOS and the last
            tokens. How many were is logged and kept in num_overlong.
        seed: of the order of the training prompts; the value of seed_everything when null.
        on_data_change: what happens when a run is resumed and its training or validation prompts, prompts_per_step or
            seed have changed since: refuse, or warn and go on. With another prompts_per_step it goes on after the same
            prompts; with other prompts or another seed, with a new epoch.
    """

    def __init__(
        self,
        train: PromptSource | None = None,
        validation: PromptSource | None = None,
        test: PromptSource | None = None,
        predict: PromptSource | None = None,
        prompts_per_step: int = 8,
        val_prompts_per_step: int | None = None,
        system_prompt: str | None = None,
        apply_chat_template: Template = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Overlong = "error",
        seed: int | None = None,
        on_data_change: OnDataChange = "refuse",
    ) -> None:
        super().__init__(on_data_change)
        if apply_chat_template == "never" and (system_prompt is not None or chat_template_kwargs):
            raise ValueError(
                "apply_chat_template='never' leaves system_prompt and chat_template_kwargs without effect. Remove "
                "them, or use 'auto'."
            )
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens={max_prompt_tokens} must be at least 1. Use null for no limit.")
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.prompts_per_step = prompts_per_step
        self.val_prompts_per_step = prompts_per_step if val_prompts_per_step is None else val_prompts_per_step
        self.limit = Limit(max_prompt_tokens, overlong)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_overlong: dict[str, int] = {}
        self._rendering: dict[str, Any] = {
            "system_prompt": system_prompt,
            "apply_chat_template": apply_chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        self._datasets: dict[str, PromptDataset] = {}
        self._stream: PromptRenderer | None = None
        self._origin: Any = Place()
        self._order: PromptSampler | PromptStream | None = None

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of the prompts that ``fit`` reads."""
        of_stream = {} if self._stream is None else {"train": fingerprint(self._stream, self.limit)}
        parts = ("train", "validation")
        return of_stream | {part: self._datasets[part].fingerprint for part in parts if part in self._datasets}

    @property
    def longest_prompts(self) -> dict[str, tuple[int, str]]:
        """Tokens of the longest prompt of each part that is set up, and where it stands; at most, of a stream."""
        of_stream = {} if self._stream is None else {"train": (self.limit.max_tokens or 0, "a row of the stream")}
        return of_stream | {
            part: (dataset.longest[0], f"row {dataset.longest[1]} (counted from 0) of {dataset.render.source.path}")
            for part, dataset in self._datasets.items()
        }

    @property
    def order_settings(self) -> dict[str, Any]:
        """Of the training prompts."""
        return {"prompts_per_step": self.prompts_per_step, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Also where the next step begins."""
        place = self._origin if self._order is None else self._order.place(self._order.position())
        return {**super().state_dict(), "place": asdict(place)}

    def go_on(self, state_dict: dict[str, Any], drawn_anew: bool) -> str:
        """After the same prompts, however many make a step; another order begins with a new epoch."""
        kind, known = Place if self._stream is None else StreamPlace, state_dict.get("place", {})
        self._origin = place = kind(**{field.name: known[field.name] for field in fields(kind) if field.name in known})
        if not drawn_anew:
            read = f"{place.offset} {'prompts' if self._stream is None else 'rows'}"
            return f"after the {read} that epoch {place.epoch} has read: none is skipped or repeated"
        self._origin = kind(place.step, place.epoch + 1)
        return f"with the new data, in an order drawn anew, from the beginning of epoch {place.epoch + 1}"

    def prepare_data(self) -> None:
        """Fetch what is not local, on one process per node; ``setup`` then reads the cache."""
        for source in self.sources.values():
            if source is not None and source.stream_buffer is None:
                load_rows(source)

    def setup(self, stage: str) -> None:
        """Read, render and check the prompts of ``stage`` (fit, validate, test, predict)."""
        stage = TrainerFn(stage).value
        parts = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,))
        for part in parts:
            source = self.sources[part]
            if source is None and not (stage == "fit" and part == "validation"):
                raise ValueError(f"no {part} prompts are given, which '{stage}' needs. Set data.{part}.path.")
            if source is None or part in self._datasets:
                continue
            if part == "train" and source.stream_buffer is not None:
                self._stream = self._stream or self._begin_stream(source)
            else:
                self._datasets[part] = self._dataset(part, source)

    def train_dataloader(self) -> DataLoader[Any]:
        """P / world size prompts a step, shuffled, from the step on at which a resumed run stands."""
        trainer: Any = self.trainer
        if trainer.overfit_batches:
            raise ValueError(
                f"overfit_batches={trainer.overfit_batches} has no effect on the order of these prompts. Set "
                "data.train.limit to that many prompts instead."
            )
        # Said on resume of every loader without a state; the order of ours needs none.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        order: dict[str, Any] = {
            "seed": self.seed,
            "position": lambda: batches_processed(trainer),
            "origin": lambda: self._origin,
            **self._shard(),
        }
        if self._stream is not None:
            self._pad_token_id()
            order |= {"prompts_per_step": self.prompts_per_step, "on_change": self._on_stream_change}
            self._order = stream = PromptStream(self._stream, self.limit, **order)
            return DataLoader(stream, batch_size=None, collate_fn=_as_it_is)
        dataset = self._datasets["train"]
        self._order = sampler = PromptSampler(len(dataset), self.prompts_per_step, **order)
        return self._loader(dataset, sampler)

    @property
    def can_read_further(self) -> bool:
        """Whether a step may read ``further_prompts``; not of a stream, in which the next step is read ahead."""
        train = self.sources["train"]
        return train is None or train.stream_buffer is None

    def further_prompts(self, count: int) -> list[int]:
        """Rows of the next ``count`` training prompts for this step, over all ranks; the next step begins after them.

        The same on every rank; fewer where the step has read all prompts.
        """
        assert isinstance(self._order, PromptSampler)
        return self._order.further(count)

    def upcoming_prompts(self) -> PromptBatch:
        """This rank's training prompts of the step after the present one."""
        assert isinstance(self._order, PromptSampler)
        return self.training_prompts(self._order.step(self._order.position() + 1))

    def training_prompts(self, rows: Sequence[int]) -> PromptBatch:
        """The training prompts of ``rows``, as a step gets them."""
        return self._datasets["train"].batch(rows)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All validation prompts in order; nothing if none are given."""
        if "validation" in self._datasets:
            return self._in_order("validation")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """All test prompts in order."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """All prompts to complete, in order."""
        warnings.filterwarnings("ignore", message="You are using a custom batch sampler `InOrderSampler`")
        return self._in_order("predict")

    def renderer(self, source: PromptSource) -> PromptRenderer:
        """Row of ``source`` → prompt, rendered as this module renders its own."""
        assert self.trainer is not None
        return PromptRenderer(self.trainer.lightning_module.tokenizer, source, **self._rendering)

    def _dataset(self, part: str, source: PromptSource) -> PromptDataset:
        rows = load_rows(source)
        dataset = PromptDataset(rows, self.renderer(source), self.limit)
        self.num_overlong[part] = dataset.num_overlong
        done = {"drop": "dropped", "truncate_left": "cut on the left", "error": ""}[self.limit.overlong]
        cut = f", {dataset.num_overlong} longer than {self.limit.max_tokens} tokens were {done}"
        note = cut if dataset.num_overlong else ""
        _say(part, f"{len(dataset)} prompts", source, note, columns_of(rows))
        return dataset

    def _begin_stream(self, source: PromptSource) -> PromptRenderer:
        if self.limit.max_tokens is None:
            raise ValueError(
                f"stream_buffer={source.stream_buffer} of {source.path} needs max_prompt_tokens: how long the longest "
                "prompt of a stream is, is not known before. Set data.init_args.max_prompt_tokens, and overlong to "
                "drop or truncate_left."
            )
        render, first = self.renderer(source), next(stream_rows(source))
        render(0, first)  # refused now rather than in the first step
        _say("train", "a stream", source, "", [*first])
        return render

    def _on_stream_change(self, what: str) -> None:
        if self.on_data_change == "refuse":
            raise ValueError(
                f"{what} are not those that the run has read before. Restore them, or set "
                "data.init_args.on_data_change: warn to go on after as many rows."
            )
        rank_zero_warn(f"{what} are not those that the run has read before. Going on after as many (on_data_change).")

    def _in_order(self, part: str) -> DataLoader[Any]:
        dataset = self._datasets[part]
        return self._loader(dataset, InOrderSampler(len(dataset), self.val_prompts_per_step, **self._shard()))

    def _shard(self) -> dict[str, int]:
        """Rank and world size among the processes that read different data (tensor-parallel ones read the same)."""
        assert self.trainer is not None
        given = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"rank": given["rank"], "world_size": given["num_replicas"]}

    def _loader(self, dataset: PromptDataset, sampler: PromptSampler | InOrderSampler) -> DataLoader[Any]:
        trainer: Any = self.trainer
        if sampler.world_size > 1 and uses_distributed_sampler(trainer):
            raise ValueError(
                "use_distributed_sampler=True would split prompts that are already split over the ranks. Set "
                "trainer.use_distributed_sampler: false."
            )
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_with(self._pad_token_id()))

    def _pad_token_id(self) -> int:
        trainer: Any = self.trainer
        pad_token_id: int | None = trainer.lightning_module.tokenizer.pad_token_id
        if pad_token_id is None:
            raise ValueError("the tokenizer has no pad token, which batches of prompts need. Set its pad_token.")
        return pad_token_id


def _say(part: str, what: str, source: PromptSource, note: str, columns: Sequence[str]) -> None:
    others = sorted({*columns} - {source.column, source.system_column})
    note += f"; rewards may read the other columns {others}" if others else ""
    rank_zero_info(f"{part}: {what} of {source.path}, from its column '{source.column}'{note}.")


def _as_it_is(batch: Any) -> Any:
    return batch
