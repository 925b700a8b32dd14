"""How a private name is taken, and what is said where it is gone."""

from importlib.metadata import version
from operator import attrgetter
from typing import Any


def get(library: str, owner: Any, path: str) -> Any:
    """``owner.path``, or a RuntimeError that names the version of ``library``, which no longer has it."""
    try:
        return attrgetter(path)(owner)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise RuntimeError(
            f"{library} {version(library)} has no {kind.__name__}.{path}, which gopo-lightning relies on; install a "
            f"version of {library} that it was tested with (requirements.lock)"
        ) from error
