"""Whether a resumed run reads the data that its checkpoint was made with."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

OnDataChange = Literal["refuse", "warn"]

_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_MEANINGS = {
    "num_prompts": "the number of prompts",
    "num_rows": "the number of rows",
    "rows": "the content of rows",
    "tokens": "the tokens of prompts (tokenizer, template or system prompt)",
    "rendering": "how prompts are rendered (tokenizer, template or system prompt)",
    "cut_to_tokens": "what long prompts are cut to",
}


class Digest:
    """Hashes values one after the other: by content, so that every process gets the same.

    >>> one, other = Digest(), Digest()
    >>> one.add({"a": 1, "b": [2]}); other.add({"b": [2], "a": 1})
    >>> one.value == other.value
    True
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """A value as it comes out of a dataset; one that JSON does not know counts as its text."""
        text = json.dumps(value, sort_keys=True, default=lambda other: _ADDRESS.sub("", str(other)))
        self._hash.update(text.encode() + b"\n")

    @property
    def value(self) -> str:
        """Of all values so far."""
        return self._hash.hexdigest()


class FingerprintedDataModule(LightningDataModule):
    """A data module whose checkpoints hold a fingerprint of the training and validation data.

    Args:
        on_data_change: what happens when ``fit`` resumes with data that have changed: refuse, or warn and go on.
    """

    def __init__(self, on_data_change: OnDataChange) -> None:
        super().__init__()
        self.on_data_change = on_data_change

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of each part that ``fit`` reads: its path, and plain values that tell whether it is the same."""
        raise NotImplementedError

    @property
    def order_settings(self) -> dict[str, Any]:
        """Plain values of the settings on which the order of the training data depends, their seed among them."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The fingerprints, and how the data are read."""
        return {"fingerprints": self.fingerprints, "order": self.order_settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare, where a run is resumed; a validation of the checkpoint may well read other data.

        Raises:
            ValueError: the data or their order have changed, and ``on_data_change`` is refuse.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before, now = state_dict["fingerprints"], self.fingerprints
        order_before, order_now = state_dict.get("order", self.order_settings), self.order_settings
        changes = describe_changes(before, now) + describe_order_changes(order_before, order_now)
        what = f"the data are not those of the checkpoint, or are read otherwise: {'; '.join(changes)}. "
        if changes and self.on_data_change == "refuse":
            raise ValueError(
                f"{what}The run would not be the one that was interrupted. Restore the data, or set "
                "data.init_args.on_data_change: warn to go on with the new ones."
            )
        drawn_anew = order_before.get("seed") != order_now.get("seed") or bool(
            describe_changes(_of_train(before), _of_train(now))
        )
        where = self.go_on(state_dict, drawn_anew)
        if changes:
            rank_zero_warn(f"{what}Going on {where} (on_data_change: warn).")

    def go_on(self, state_dict: dict[str, Any], drawn_anew: bool) -> str:
        """Find the place at which to go on in the training data, whose order may be another, and say it."""
        return "with the new data, in an order drawn anew" if drawn_anew else "in the same order"


def describe_order_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One part of a sentence for each setting that differs.

    >>> describe_order_changes({"prompts_per_step": 4, "seed": 0}, {"prompts_per_step": 6, "seed": 0})
    ['prompts_per_step 4 → 6']
    """
    return [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]


def describe_changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each part of the data that differs; a file that has only moved is the same."""
    changes = [f"there is no {part} data any more ({before[part]['path']})" for part in sorted(set(before) - set(now))]
    changes += [f"there is new {part} data ({now[part]['path']})" for part in sorted(set(now) - set(before))]
    for part in sorted(set(before) & set(now)):
        differing = [key for key in now[part] if key != "path" and now[part][key] != before[part].get(key)]
        if differing:
            said = [_said(key, before[part].get(key), now[part][key]) for key in differing]
            changes.append(f"{part} ({now[part]['path']}) differs in {', '.join(said)}")
    return changes


def _of_train(fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    return {part: fingerprint for part, fingerprint in fingerprints.items() if part == "train"}


def _said(key: str, before: Any, now: Any) -> str:
    hashed = isinstance(now, str)
    return _MEANINGS.get(key, key) + ("" if hashed else f" ({before} then, {now} now)")
