"""Training of a reward model on comparisons, after Bradley and Terry (1952).

The probability that text i beats text j is σ(s_i − s_j), with s the model's scores: only differences mean
anything. The result is a Hugging Face folder for `SequenceClassifierReward`.
"""

from functools import partial
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat
from transformers import get_scheduler

from gopo_lightning.data.preferences import Comparisons
from gopo_lightning.rewards.loading import (
    Truncation,
    encode,
    load_classifier,
    load_tokenizer,
    max_length_of,
    pad,
    set_pad_token,
)


def bradley_terry(scores_N: Tensor, wins_NN: Tensor) -> Tensor:
    """Mean over the ordered pairs (i, j) of  −W_ij · log σ(s_i − s_j) − (1 − W_ij) · log σ(s_j − s_i).

    Args:
        scores_N: the model's scores.
        wins_NN: W_ij in [0, 1], how surely i beats j (½ is a tie); NaN pairs are left out of sum and
            denominator.

    Returns:
        float32 scalar; 0 with zero gradient where no pair is asked.
    """
    difference_NN = scores_N.float()[:, None] - scores_N.float()[None, :]
    asked_NN = ~wins_NN.isnan()
    wins_NN = wins_NN.nan_to_num(0.5).to(difference_NN.dtype)
    losses_NN = F.binary_cross_entropy_with_logits(difference_NN, wins_NN, reduction="none")
    return (losses_NN * asked_NN).sum() / asked_NN.sum().clamp(min=1)


def pair_accuracy(scores_N: Tensor, ratings_N: Tensor, min_gap: float = 0.0) -> Tensor:
    """Share of the pairs with ratings more than ``min_gap`` apart that the scores put in the same order.

    Equal scores count half. NaN when no pair is that far apart.
    """
    rated_NN = ratings_N[:, None] - ratings_N[None, :]
    scored_NN = scores_N[:, None] - scores_N[None, :]
    right_NN = 0.5 * (1 + scored_NN.sign())
    return right_NN[rated_NN > min_gap].mean()


class PairAccuracy(Metric):
    """`pair_accuracy` over everything since the last reset, all ranks together."""

    full_state_update = False
    higher_is_better = True
    scores: list[Tensor]
    ratings: list[Tensor]

    def __init__(self, min_gap: float = 0.0) -> None:
        super().__init__()
        self.min_gap = min_gap
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("ratings", default=[], dist_reduce_fx="cat")

    def update(self, scores_N: Tensor, ratings_N: Tensor) -> None:
        """Add N texts."""
        self.scores.append(scores_N)
        self.ratings.append(ratings_N)

    def compute(self) -> Tensor:
        """In [0, 1]."""
        return pair_accuracy(dim_zero_cat(self.scores), dim_zero_cat(self.ratings), self.min_gap)


class RewardModelModule(LightningModule):
    """Fine-tunes a sequence classifier with one label on comparisons (Bradley–Terry).

    Logs `train/loss`; `val/pair_accuracy` over pairs of held-out texts with mean ratings more than 1 apart,
    `val/pair_accuracy_all` over all pairs with different ratings, and `val/spearman`.

    Args:
        model: hub name, local folder or `packaged:NAME` of an encoder or a causal LM; a new head is put on
            it.
        export_dir: folder for model and tokenizer at the end of training; null saves nothing.
        revision: branch, tag or commit on the hub.
        tokenizer: hub name or folder of the tokenizer; the model's own when null.
        max_length: most tokens of a text; the model's own limit when null.
        truncation: what happens above max_length: `error`, or drop tokens on the `left` or `right`.
        optimizer: built on the model's parameters; AdamW by default.
        lr_schedule: a schedule of `transformers.get_scheduler`, such as `linear` (to 0 at the last step),
            `cosine`, `constant_with_warmup`.
        warmup_steps: optimiser steps over which the learning rate rises from 0.
        trust_remote_code: run Python code that comes with the model. Only for sources you trust.
    """

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
    ) -> None:
        super().__init__()
        self.export_dir = None if export_dir is None else Path(export_dir)
        self.truncation, self.optimizer_callable = truncation, optimizer
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.tokenizer = load_tokenizer(tokenizer or model, revision, trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {model} has no pad token, which batches need. Set model.tokenizer to one that has."
            )
        self.model = load_classifier(model, revision, "float32", trust_remote_code, num_labels=1).train()
        set_pad_token(self.model, self.tokenizer)
        self.max_length = max_length or max_length_of(self.model, self.tokenizer)
        self.metrics = torch.nn.ModuleDict(
            {
                "pair_accuracy": PairAccuracy(min_gap=1.0),
                "pair_accuracy_all": PairAccuracy(),
                "spearman": SpearmanCorrCoef(),
            }
        )

    def forward(self, texts: tuple[str, ...]) -> Tensor:
        """scores_N of N texts."""
        encoded = encode(self.tokenizer, texts, self.max_length, self.truncation)
        inputs = pad(self.tokenizer, encoded, range(len(texts))).to(self.device)
        return self.model(**inputs).logits.squeeze(-1)

    def training_step(self, batch: Comparisons, batch_idx: int) -> Tensor:
        """The Bradley–Terry loss over the ordered pairs of this rank's batch."""
        loss = bradley_terry(self(batch.texts), batch.wins_NN)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Comparisons, batch_idx: int) -> None:
        """Collect float32 scores: bfloat16 ones would tie."""
        assert batch.ratings_N is not None
        with torch.autocast(self.device.type, enabled=False):
            scores_N = self(batch.texts).float()
        for name, metric in self.metrics.items():
            metric.update(scores_N, batch.ratings_N)  # type: ignore[operator]
            self.log(f"val/{name}", metric, prog_bar=True, batch_size=len(batch))  # type: ignore[arg-type]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimiser, and a schedule stepped with every optimiser step."""
        optimizer = self.optimizer_callable(self.model.parameters())
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(self.lr_schedule, optimizer, self.warmup_steps, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        """Export, by rank 0. A `fast_dev_run` writes nothing, as everywhere in Lightning."""
        if self.export_dir is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.save_pretrained(self.export_dir)
            self.tokenizer.save_pretrained(self.export_dir)
            print(f"reward model saved in {self.export_dir}", flush=True)
