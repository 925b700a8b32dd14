"""Whether a resumed run goes on as the one that was interrupted: which settings differ, and what follows from that.

Settings are nested dicts of plain values, as a checkpoint keeps them. Some make the run what it is (fixed ones): with
another value of these, what was trained and what will be trained do not belong together. The others act from the
resume on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

OnSettingChange = Literal["refuse", "warn"]

KEY = "gopo_settings"
"""Under which a checkpoint keeps them."""
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_ABSENT = "absent"


class Change(NamedTuple):
    """One setting that differs.

    >>> str(Change("optimizer.lr", 1e-6, 1e-5))
    'optimizer.lr 1e-06 → 1e-05'
    """

    name: str
    before: Any
    now: Any

    def is_any_of(self, names: Sequence[str]) -> bool:
        """Whether it is one of the settings with these dotted names, or stands below one."""
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)

    def __str__(self) -> str:
        return f"{self.name} {self.before} → {self.now}"


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` in values that JSON knows; any other counts as its text."""
    text = json.dumps(settings, default=lambda value: _ADDRESS.sub("", str(value)))
    return dict(json.loads(text))


def describe_setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs, in the order of names; a setting that one side does not have is ``absent`` there.

    Sections (first parts of names) that either does not have are not compared: another version wrote the checkpoint.

    >>> before = {"seed": 1, "loss": {"kl_coef": 0}, "other": 1}
    >>> [str(change) for change in describe_setting_changes(before, {"seed": 2, "loss": {"clip_low": 0.2}})]
    ['loss.clip_low absent → 0.2', 'loss.kl_coef 0 → absent', 'seed 1 → 2']
    """
    sections = old.keys() & new.keys()
    before, now = (_flat({name: side[name] for name in sections}) for side in (old, new))
    names = sorted(before.keys() | now.keys())
    changes = (Change(name, before.get(name, _ABSENT), now.get(name, _ABSENT)) for name in names)
    return [change for change in changes if change.before != change.now]


def check_setting_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], fixed: Sequence[str], on_change: OnSettingChange, *, option: str
) -> list[Change]:
    """Refuse or tell, in one sentence, and return the changes.

    Args:
        old: of the checkpoint.
        new: of the run that resumes.
        fixed: dotted names of the settings that make the run what it is, each with all below it.
        on_change: what happens where one of these differs.
        option: the option that holds ``on_change``, for the message.

    Raises:
        ValueError: a fixed setting differs, and ``on_change`` is refuse.
    """
    changes = describe_setting_changes(old, new)
    other = "; ".join(str(change) for change in changes if change.is_any_of(fixed))
    if other and on_change == "refuse":
        raise ValueError(
            f"the run was started with other settings: {other}. It would not be the one that was interrupted. Restore "
            f"them, start a new run, or set {option}: warn to go on with the new ones."
        )
    if other:
        rank_zero_warn(f"this run goes on as another one from here: {other} ({option}: warn).")
    if free := "; ".join(str(change) for change in changes if not change.is_any_of(fixed)):
        rank_zero_info(f"Settings that changed since the checkpoint, and act from here on: {free}.")
    return changes


def check_checkpoint(
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    fixed: Sequence[str],
    on_change: OnSettingChange,
    *,
    training: bool,
) -> None:
    """`check_setting_changes` of what ``checkpoint`` keeps; an evaluation takes any settings, but of its policy.

    Raises:
        ValueError: a fixed setting differs, and ``on_change`` is refuse.
    """
    if KEY not in checkpoint:
        return
    now = settings if training else {**checkpoint[KEY], "policy": settings.get("policy")}
    check_setting_changes(checkpoint[KEY], now, fixed, on_change, option="model.init_args.on_setting_change")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; an empty one stays, as a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
