"""Training of a reward model on comparisons. The maths is in `objectives/comparison_losses.py` and `metrics.py`."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import BatchEncoding, PreTrainedModel

from gopo_lightning.data.comparison_batches import Comparisons
from gopo_lightning.data.comparisons import Text
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.distributed.checkpoints import install_atomic_saving
from gopo_lightning.distributed.collectives import all_or_none, all_reduce_sum, world_size
from gopo_lightning.distributed.fsdp import clip_grad_norm
from gopo_lightning.objectives.comparison_losses import bradley_terry, centring, plackett_luce
from gopo_lightning.policy.adapters import add_lora, lora_config
from gopo_lightning.policy.model import evaluating
from gopo_lightning.policy.positions import max_length_of
from gopo_lightning.policy.prefix_sharing import PrefixSharing
from gopo_lightning.rewards.calibration import Calibration, calibrate
from gopo_lightning.rewards.loading import (
    Truncation,
    check_texts,
    encode_texts,
    load_classifier,
    load_tokenizer,
    set_pad_token,
)
from gopo_lightning.rewards.shared_scoring import Scorer
from gopo_lightning.training.callbacks.export import Chosen, check_chosen, push_or_warn, weights_to_export
from gopo_lightning.training.callbacks.run_start import RunStart
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from gopo_lightning.training.checks import check_finite, check_outputs, check_precision
from gopo_lightning.training.export_folder import check_export_folder
from gopo_lightning.training.model_card import model_card
from gopo_lightning.training.optimisation import OptimisedModule
from gopo_lightning.training.resume import OnSettingChange, plain
from gopo_lightning.training.reward_model.export import check_push, export_reward_model
from gopo_lightning.training.reward_model.metrics import ComparisonMetrics
from gopo_lightning.training.schedules import Schedule, WarmupStart

Objective: TypeAlias = Literal["bradley_terry", "plackett_luce"]


class RewardModelModule(OptimisedModule):
    """Fine-tunes a sequence classifier with one label on comparisons.

    Beside the exported weights it leaves τ of the held-out pairs, which the `calibrated` advantage reads.

    Logs `train/loss`, and of held-out data log-loss, accuracy over pairs (also by gap of ratings), calibration error,
    length bias and, where texts have ratings, Spearman's and Kendall's rank correlations.

    Args:
        model: hub name, local folder or `packaged:NAME` of an encoder or a causal LM; a new head is put on
            it.
        export_dir: folder for model and tokenizer at the end of training; null saves nothing. An earlier export there
            is replaced; a folder that holds anything else is refused before training.
        revision: branch, tag or commit on the hub.
        tokenizer: hub name or folder of the tokenizer; the model's own when null.
        max_length: most tokens of a text; the model's own limit when null.
        truncation: what happens above max_length: `error`, or drop tokens on the `left` or `right`.
        optimizer: built on the model's parameters; AdamW by default.
        lr_schedule: a schedule of `transformers.get_scheduler`, such as `linear` (to 0 at the last step),
            `cosine`, `constant_with_warmup`.
        warmup_steps: optimiser steps over which the learning rate rises to its whole.
        trust_remote_code: run Python code that comes with the model. Only for sources you trust.
        objective: `bradley_terry` compares pairs (all pairs of a ranked list); `plackett_luce` takes each ranked list
            as choices of the best from what is left, and needs lists without ties.
        margin_scale: the preferred text has to lead by this times the data's margin (a `margin` column, or the gap of
            ratings); 0 for none.
        centring_coef: weight of the mean of (s_i + s_j)² over the compared pairs, which keeps scores around 0.
        lora: arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, …), merged into the weights at export;
            null trains all weights.
        gap_bounds: edges between gaps of ratings for which `val/pair_accuracy_gap_<low>-<high>` is logged.
        warmup_start: the warm-up's step k = 0, 1, … has (k + 1) / warmup_steps of the learning rate (`first_step`), or
            k / warmup_steps (`zero`, transformers' rule: the first step changes nothing). A checkpoint keeps its own.
        lr_schedule_options: keyword arguments of the schedule, such as `min_lr_rate: 0.1` of `cosine_with_min_lr`.
        on_setting_change: what happens when a run is resumed with another optimiser class or model: `refuse`, or `warn`
            and go on. Any other setting may change, and acts from the resume on.
        prefix_sharing: forward the tokens with which the texts of a pair or list begin once: `auto` where the model can
            (a causal one; it checks itself on the first pairs) and it saves tokens, `always` or an error, `never`.
        export_weights: which weights are exported: the `last`, or those of the `best` checkpoint by the metric that a
            ModelCheckpoint monitors.
        push_to_hub: OWNER/NAME of the model on the hub to which the export is also uploaded; null leaves it here.
        push_private: whether that model is private if it has to be made.
    """

    kind = "reward model"
    fixed_settings = ("optimizer.class", "model", "objective")

    def __init__(
        self,
        model: str,
        export_dir: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        truncation: Truncation = "error",
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=5e-5),  # noqa: B008
        lr_schedule: str = "linear",
        warmup_steps: int = 10,
        trust_remote_code: bool = False,
        objective: Objective = "bradley_terry",
        margin_scale: float = 0.0,
        centring_coef: float = 0.0,
        lora: dict[str, Any] | None = None,
        gap_bounds: list[float] | None = None,
        prefix_sharing: PrefixSharing = "auto",
        warmup_start: WarmupStart = "first_step",
        lr_schedule_options: dict[str, Any] | None = None,
        on_setting_change: OnSettingChange = "refuse",
        export_weights: Chosen = "last",
        push_to_hub: str | None = None,
        push_private: bool = True,
    ) -> None:
        super().__init__()
        if objective not in get_args(Objective):
            raise ValueError(f"objective={objective!r} is unknown; use one of {list(get_args(Objective))}.")
        if margin_scale < 0 or centring_coef < 0 or (margin_scale and objective == "plackett_luce"):
            raise ValueError(
                f"margin_scale={margin_scale}, centring_coef={centring_coef}: neither may be negative, and margins "
                "belong to pairs. Use 0, or objective: bradley_terry."
            )
        if lora is not None:
            lora_config(lora, task_type="SEQ_CLS", option="model.lora")  # before anything is loaded
        self.objective, self.margin_scale, self.centring_coef = objective, margin_scale, centring_coef
        self.export_dir = None if export_dir is None else Path(export_dir)
        self.export_weights, self.push_to_hub, self.push_private = export_weights, push_to_hub, push_private
        self.base_model = model, revision
        check_push(push_to_hub, export_dir, export_weights)
        self.truncation, self.optimizer_callable = truncation, optimizer
        self.schedule = Schedule(lr_schedule, warmup_steps, warmup_start, lr_schedule_options or {})
        self.on_setting_change: OnSettingChange = on_setting_change
        self._settings: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "lora": lora or {},
            "objective": objective,
            "margin_scale": margin_scale,
            "centring_coef": centring_coef,
        }
        self.tokenizer = load_tokenizer(tokenizer or model, revision, trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {model} has no pad token, which batches need. Set model.tokenizer to one that has."
            )
        classifier = load_classifier(model, revision, "float32", trust_remote_code, num_labels=1)
        set_pad_token(classifier, self.tokenizer)
        self.max_length = max_length_of(classifier, self.tokenizer, max_length)
        self.model = _with_lora(classifier, lora).train()
        self.metrics = ComparisonMetrics(gap_bounds or ())
        self.scorer = Scorer(self.tokenizer, prefix_sharing)

    def configure_callbacks(self) -> list[Callback]:
        """Names that lead out of the run's folder are refused here, before anything is written."""
        check_outputs(self.trainer)
        return [*super().configure_callbacks(), RunStart(), SaveOnSignal()]

    def setup(self, stage: str) -> None:
        """Checkpoints are written whole; an export that would overwrite something, and a text that cannot be read, are
        refused.
        """
        install_atomic_saving(self.trainer)
        check_precision(self.trainer)
        if stage == "fit":
            check_chosen(self.trainer, self.export_weights)
        with all_or_none("the check of the export folder"):
            if stage == "fit" and self.export_dir is not None and self.trainer.is_global_zero:
                check_export_folder(self.export_dir, "model.init_args.export_dir")
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            check_texts(self.tokenizer, data.texts(), self.max_length, self.truncation)

    def forward(self, texts: tuple[Text, ...], group_sizes: tuple[int, ...] | None = None) -> Tensor:
        """scores_N of N texts, which belong together as ``group_sizes`` says (None: each stands alone)."""
        return self.scorer(self.model, self._encode(texts), group_sizes)

    def _encode(self, texts: tuple[Text, ...]) -> BatchEncoding:
        return encode_texts(self.tokenizer, texts, self.max_length, self.truncation)

    def training_step(self, batch: Comparisons, batch_idx: int) -> Tensor:
        """The loss over the comparisons of all ranks' batches: every pair weighs the same, on whichever rank it is.

        (Of ranked lists under `plackett_luce` ranks have equally many.)
        """
        scores_N = self(batch.texts, batch.group_sizes)
        num_pairs = all_reduce_sum((~batch.wins_NN.isnan()).sum().float()) / world_size()
        num_pairs = num_pairs.clamp(min=1 / world_size())  # without a pair on any rank the loss is 0
        loss = self._loss(scores_N, batch, num_pairs)
        if self.centring_coef:
            loss = loss + self.centring_coef * centring(scores_N, batch.wins_NN, num_pairs)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self._latest = batch, loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """No step is made with a loss or gradient that is not finite; a collective.

        The loss scaling of 16-mixed skips such steps by itself.
        """
        batch, loss = self._latest
        if self.trainer.precision != "16-mixed":
            mean_loss = all_reduce_sum(loss.float()) / world_size()
            check_finite(self.trainer, batch, mean_loss, clip_grad_norm(self.model, float("inf")))

    def _loss(self, scores_N: Tensor, batch: Comparisons, num_pairs: Tensor | None = None) -> Tensor:
        if self.objective == "plackett_luce":
            if batch.rankings is None:
                raise ValueError(
                    "objective: plackett_luce needs ranked lists without ties, and the data have none (or ties in "
                    "some). Use objective: bradley_terry."
                )
            return plackett_luce(scores_N, batch.rankings)
        if not self.margin_scale:
            return bradley_terry(scores_N, batch.wins_NN, None, num_pairs)
        if batch.margins_NN is None:
            raise ValueError(
                f"margin_scale={self.margin_scale}, but the data have no margins and no ratings. Set margin_scale: 0."
            )
        return bradley_terry(scores_N, batch.wins_NN, self.margin_scale * batch.margins_NN, num_pairs)

    def validation_step(self, batch: Comparisons, batch_idx: int) -> Tensor:
        """Collect float32 scores_N: bfloat16 ones would tie."""
        encoded = self._encode(batch.texts)
        lengths_N = torch.tensor([len(ids) for ids in encoded["input_ids"]], device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            scores_N = self.scorer(self.model, encoded, batch.group_sizes)
        self.metrics.update(scores_N.float(), lengths_N, batch)
        return scores_N

    def on_validation_epoch_end(self) -> None:
        """Over all ranks; a collective."""
        values = self.metrics.compute()
        self.metrics.reset()
        for name, value in values.items():
            self.log(f"val/{name}", value)
        self.log("step", float(self.logged_step))
        shown = ", ".join(f"{name} {value.item():.3f}" for name, value in values.items() if "gap" not in name)
        rank_zero_info(f"step {self.logged_step}, held-out data: {shown}")

    def run_settings(self) -> dict[str, Any]:
        """Also of the model and its loss."""
        return super().run_settings() | plain(self._settings)

    def on_train_end(self) -> None:
        """Export, by rank 0. A `fast_dev_run` writes nothing, as everywhere in Lightning."""
        if self.export_dir is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        weights = weights_to_export(self.trainer, self.export_weights)
        if weights.state:
            self.load_state_dict(weights.state)
        calibration = self._calibrate()
        if self.trainer.is_global_zero:
            card = model_card(weights.record, step=weights.step, is_adapter=False, chosen=weights.how)
            written = export_reward_model(self.model, self.tokenizer, self.export_dir, card, calibration)
            print(f"reward model of {weights} saved in {written}", flush=True)
            if self.push_to_hub is not None:
                push_or_warn(written, self.push_to_hub, private=self.push_private)

    @torch.no_grad()
    def _calibrate(self) -> Calibration | None:
        """τ of the held-out pairs under the weights that are exported, for which they are scored once more.

        None, and a word, where there is none. A collective.
        """
        with evaluating(self.model):
            for number, batch in enumerate(self._held_out_batches()):
                self.validation_step(batch, number)
        if not self.metrics.scores:
            return None
        fitted = calibrate(*self.metrics.pairs())
        self.metrics.reset()
        if isinstance(fitted, str):
            rank_zero_info(f"no τ is exported for the calibrated advantage: {fitted}")
            return None
        rank_zero_info(f"τ = {fitted.tau:.4g} of {fitted.num_pairs} held-out pairs, log-loss {fitted.log_loss:.3f}")
        return fitted

    def _held_out_batches(self) -> Iterator[Comparisons]:
        """Those of a validation; none without one."""
        loaders = self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        for loader, number in zip(loaders, self.trainer.num_val_batches, strict=False):
            yield from islice(loader, None if number == math.inf else int(number))


def _with_lora(model: PreTrainedModel, lora: dict[str, Any] | None) -> PreTrainedModel | PeftModel:
    """The adapters are trained, and the head, which is new."""
    return model if lora is None else add_lora(model, lora, task_type="SEQ_CLS", option="model.lora")
