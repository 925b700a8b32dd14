"""Held-out pairs that a reward model orders most wrongly, as a table in the loggers."""

from typing import Any

import lightning as L
from torch import Tensor

from gopo_lightning.data.comparison_batches import Comparisons
from gopo_lightning.data.comparisons import Text
from gopo_lightning.training.callbacks.samples import escape, number
from gopo_lightning.training.loggers import Cell, Table, log_table

COLUMNS = ("lead", "preference", "score of preferred", "score of other", "preferred", "other")


def worst_pairs(batch: Comparisons, scores_N: Tensor, num_pairs: int, max_chars: int = 1000) -> Table:
    """Of the compared pairs of ``batch`` those with the smallest lead of the text that people prefer, smallest first.

    Args:
        batch: N texts.
        scores_N: of its texts.
        num_pairs: most rows of the table.
        max_chars: of a text that are shown.
    """
    scores, wins_NN = scores_N.float().tolist(), batch.wins_NN.tolist()
    kept = range(len(batch) - batch.num_padding)
    pairs = [(scores[i] - scores[j], i, j) for i in kept for j in kept if wins_NN[i][j] > 0.5]
    rows: list[list[Cell]] = [
        [lead, wins_NN[i][j], scores[i], scores[j], *(_shown(batch.texts[n])[:max_chars] for n in (i, j))]
        for lead, i, j in sorted(pairs)[:num_pairs]
    ]
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        numbers = tuple(number(float(value)) for value in row[:4])
        lines.append((*numbers, *(escape(str(text), max_chars) for text in row[4:])))
    return Table(COLUMNS, rows, "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def _shown(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


class PairTable(L.Callback):
    """Logs, at each validation of a reward model, the pairs that it orders most wrongly, as ``val/pairs``.

    Every logger of the run gets them (docs/loggers.md). They are looked for in rank 0's first validation batch, which
    has the same pairs at every validation.

    Args:
        num_pairs: How many pairs to log.
        max_chars: A longer text is cut.
    """

    def __init__(self, num_pairs: int = 8, max_chars: int = 1000) -> None:
        if num_pairs < 1 or max_chars < 1:
            raise ValueError(
                f"num_pairs is {num_pairs} and max_chars is {max_chars}; both have to be at least 1. Remove PairTable "
                "from trainer.callbacks to log no pairs."
            )
        self.num_pairs, self.max_chars = num_pairs, max_chars

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the table of the first batch."""
        if not isinstance(batch, Comparisons) or not isinstance(outputs, Tensor):
            raise ValueError(
                f"PairTable found no scored pairs in {type(pl_module).__name__}; only a RewardModelModule has them. "
                "Remove it from trainer.callbacks."
            )
        if batch_idx == 0 and trainer.is_global_zero:
            log_table(trainer, "val/pairs", worst_pairs(batch, outputs, self.num_pairs, self.max_chars))
