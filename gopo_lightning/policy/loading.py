"""Models and tokenizers by name: a folder, a packaged asset or the hub; and what to say where there is none."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from gopo_lightning.data import assets

_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
"""Of a model's config: what says nothing about its weights."""
_SAMPLED_VALUES = 8


def locate(name: str) -> str:
    """The folder of a local or packaged model; any other ``name``, which is one of the hub, unchanged.

    Raises:
        ValueError: a path at which there is no folder.
    """
    if name.startswith(assets.PREFIX):
        return assets.resolve(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if name and path.exists():
        raise ValueError(
            f"{name} is a file, but a model is a folder with config.json and safetensors. Name the folder."
        )
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:  # the hub has NAME and OWNER/NAME
        raise ValueError(
            f"there is no folder {name!r} in {Path.cwd()}. Check the path, or run first what writes that folder."
        )
    return name


@contextmanager
def finding(name: str, revision: str | None = None) -> Iterator[None]:
    """Around whatever loads ``name``: a model that cannot be found is one sentence, not the hub's traceback.

    Raises:
        ValueError: there is neither a folder nor a hub model of that name, or it cannot be reached or read.
    """
    try:
        yield
    except OSError as error:
        problem = _problem(name, revision, error)
        if problem is None:
            raise
        raise ValueError(f"there is no folder {name!r}, and {problem}") from error


def _problem(name: str, revision: str | None, error: OSError) -> str | None:
    """What the hub's ``error`` means, and what to do; None if it is not about finding the model."""
    causes = list(_chain(error))

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(GatedRepoError):
        return f"on the hub its owner has to grant access. Ask for it at {name}'s page, then set HF_TOKEN."
    if caused_by(RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it. Set another one, or null for the newest."
    if caused_by(RepositoryNotFoundError) or caused_by(HFValidationError):
        return "no model of that name on the hub. Correct the name; for a private model set HF_TOKEN."
    if caused_by(LocalEntryNotFoundError):
        if HF_HUB_OFFLINE:
            return (
                "HF_HUB_OFFLINE is set while the hub's cache does not hold it. Correct the path, or fetch it where "
                f"there is a network: `hf download {name}`."
            )
        return f"the hub cannot be reached. Correct the path, or check the network; `hf download {name}` shows more."
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def folder_of(name: str, revision: str | None, *, fetch: bool) -> Path:
    """The local folder with the files of ``name``: its own, or one in the hub's cache.

    Args:
        fetch: download what is not there; else take what an earlier load has left.
    """
    place = locate(name)
    if Path(place).is_dir():
        return Path(place)
    wanted: Any = {
        "allow_patterns": ["*.safetensors", "*.json", "*.py", "*.jinja"],
        "ignore_patterns": ["checkpoint-*"],
    }
    with finding(name, revision):
        return Path(snapshot_download(place, revision=revision, local_files_only=not fetch, **wanted))


def fingerprint(folder: Path) -> str:
    """A short hash of a model's config and of the names, shapes and some values of its tensors.

    It is the same however the tensors are spread over files.
    """
    digest = hashlib.sha256()
    for file in (folder / "config.json", folder / "adapter_config.json"):
        if file.exists():
            kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in _VOLATILE}
            digest.update(json.dumps(kept, sort_keys=True).encode())
    tensors: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: _sample(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name])
    return digest.hexdigest()[:16]


def _sample(tensor: Any) -> bytes:
    """Dtype, shape, and values from the first and the last row."""
    shape = tensor.get_shape()
    values: list[float] = []
    for row in (slice(0, 1), slice(-1, None)) if shape and 0 not in shape else ():
        index = (row, *(slice(0, _SAMPLED_VALUES) for _ in shape[1:])) if len(shape) > 1 else row
        values += tensor[index].flatten()[:_SAMPLED_VALUES].double().tolist()
    return repr((tensor.get_dtype(), shape, values)).encode()


def load_weights(auto_class: Any, name: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, of weights in safetensors: other formats are pickles, which may run code.

    Raises:
        ValueError: the model has no safetensors.
    """
    try:
        return auto_class.from_pretrained(name, use_safetensors=True, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{name} has no weights in safetensors (model.safetensors), and pickled ones (pytorch_model.bin) are not "
            "loaded: they may run code. If you trust their source, convert them: `AutoModelForCausalLM.from_pretrained"
            f"({name!r}).save_pretrained(FOLDER)`, with the class that the model needs, and name FOLDER."
        ) from error
