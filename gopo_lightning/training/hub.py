"""Exports on the Hugging Face hub: checked before training, pushed after it, and never lost by a failure there."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import HFValidationError, validate_repo_id

from gopo_lightning.training.export_folder import LISTING


def check_repo(name: str) -> None:
    """Refuse what could not be pushed to, as far as that is known without a network.

    Raises:
        ValueError: ``name`` is no OWNER/NAME, the hub is switched off, or there is no token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={name!r} is no name of a model on the hub: {error} Give OWNER/NAME.") from error
    if name.count("/") != 1:
        raise ValueError(f"push_to_hub={name!r} has to be OWNER/NAME, such as my-name/my-model.")
    if HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub={name}, but HF_HUB_OFFLINE is set. Unset one of them.")
    if get_token() is None:
        raise ValueError(f"push_to_hub={name} needs a token that may write. Run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload the export in ``folder`` to the model ``name``, which is made if need be; its address.

    Args:
        folder: of the export; the listing of its files stays here.
        name: OWNER/NAME.
        private: of a model that is made; one that is there stays as it is.
        message: of the commit.

    Raises:
        PushError: whatever went wrong; ``folder`` is as it was.
    """
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[LISTING])
    except Exception as error:  # whatever network, server and library raise: the export is there all the same
        again = ["hf", "upload", name, str(folder), ".", *(["--private"] if private else []), "--exclude", LISTING]
        raise PushError(
            f"the export could not be pushed to {name}: {type(error).__name__}: {error}. It is whole in {folder}. "
            f"Push it again: {shlex.join(again)}"
        ) from error
    return str(address)


class PushError(RuntimeError):
    """An export is on this machine, but not on the hub."""
