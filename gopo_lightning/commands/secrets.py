"""What a config must not hold: it is saved with every run."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

_NAMES = re.compile(
    r"(token|authorization|key|pw|pwd)"
    r"|(.*_)?(api_?key|(private|access|secret|signing|encryption)_?key|secret|password|passwd|passphrase|credentials?)"
    r"|(.*_)?(access|auth|api|bearer|hub|hf|refresh|session)_?token"
)
"""Of what holds a secret, in lower case with single underscores."""
_IN_QUERIES = re.compile(r"[?&]([\w.-]+)=[^&#\s]")
_SIGNATURES = re.compile(r"(.*_)?(sig|signature)")
_WORDS = re.compile(r"[^a-zA-Z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FORMS = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}|Bearer\s+\S{8,})|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_IN_ENVIRONMENT = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|SECRET(_KEY)?|PASSWORD|TOKEN)$", re.IGNORECASE)
_SHORTEST_SECRET = 8


def refuse_secrets(config: Mapping[str, Any]) -> None:
    """Refuse a config that holds a secret: it is saved with every run. The message does not repeat it.

    Raises:
        ValueError: a value under a name such as `api_key` or `password`, of the form of a well-known kind of key, a URL
            with a password or with a key in its query, or the value of an environment variable such as OPENAI_API_KEY
            anywhere in a text.
    """
    known = {
        value
        for name, value in os.environ.items()
        if _IN_ENVIRONMENT.search(name) and len(value) >= _SHORTEST_SECRET and not value.isdigit()
    }
    for path, value in _texts(config):
        name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        if value and (_names_secret(name) or _shows_secret(value) or any(secret in value for secret in known)):
            raise ValueError(
                f"{path} holds a secret, and configs are saved with every run and shared. Put it into an environment "
                "variable; an LLMJudge takes the variable's name as api_key_env, the hub's libraries read HF_TOKEN."
            )


def _names_secret(name: str) -> bool:
    """Whether what goes by ``name`` is a secret.

    >>> [_names_secret(name) for name in ("X-API-Key", "clientSecret", "api_key_env", "tokenizer", "pad_token")]
    [True, True, False, False, False]
    """
    return _NAMES.fullmatch(_words(name)) is not None


def _shows_secret(value: str) -> bool:
    """Whether ``value`` has the form of a key, or is a URL with one in its query."""
    queried = [_words(name) for name in _IN_QUERIES.findall(value)]
    return bool(_FORMS.search(value)) or any(_NAMES.fullmatch(n) or _SIGNATURES.fullmatch(n) for n in queried)


def _words(name: str) -> str:
    """`X-API-Key` and `xApiKey` → x_api_key."""
    return "_".join(word for word in _WORDS.split(name) if word).lower()


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string and whole number of a nested config with its dotted path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _texts(item, f"{path}.{number}")
    elif isinstance(value, str | PurePath | int) and not isinstance(value, bool):
        yield path, str(value)
