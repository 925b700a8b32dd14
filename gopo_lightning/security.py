"""What a config or a downloaded file must not do: carry a secret, write outside its folder, run code as it loads."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

_NAMES = re.compile(
    r"^(token|authorization)$"
    r"|(^|[_-])(api_?key|secret(_?key)?|password|passwd|(access|auth|api|bearer|hub|hf)_?token)$",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|AKIA[A-Z0-9]{12,}|Bearer\s+\S{8,})|://[^/\s:@]+:[^/\s@]+@"
)
_IN_ENVIRONMENT = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|SECRET(_KEY)?|PASSWORD|TOKEN)$", re.IGNORECASE)
_SHORTEST_SECRET = 8


def refuse_secrets(config: Mapping[str, Any]) -> None:
    """Refuse a config that holds a secret: it is saved with every run. The message does not repeat it.

    Raises:
        ValueError: a value under a name such as `api_key` or `password`, of the form of a well-known kind of key, with
            a password in a URL, or that contains the value of an environment variable such as OPENAI_API_KEY.
    """
    known = {
        value
        for name, value in os.environ.items()
        if _IN_ENVIRONMENT.search(name) and len(value) >= _SHORTEST_SECRET and not value.isdigit()
    }
    for path, value in _texts(config):
        name = path.rpartition(".")[2]
        if value and (_NAMES.search(name) or _FORMS.search(value) or any(secret in value for secret in known)):
            raise ValueError(
                f"{path} holds a secret, and configs are saved with every run and shared. Put it into an environment "
                "variable; an LLMJudge takes the variable's name as api_key_env, the hub's libraries read HF_TOKEN."
            )


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a nested config with its dotted path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _texts(item, f"{path}.{number}")
    elif isinstance(value, str | PurePath):
        yield path, str(value)


def check_stays_inside(option: str, name: str | PurePath | None) -> None:
    """Refuse a name that is joined to the run's folder and would lead out of it.

    Raises:
        ValueError: an absolute path, a drive, or a part that is `..`.
    """
    parts = PurePath(str(name or "").replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", parts.as_posix()):
        raise ValueError(
            f"{option}={str(name)!r} leads out of the run's folder. It is a name within that folder; choose the folder "
            "itself by the logger's save_dir, or the dirpath of ModelCheckpoint."
        )


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
