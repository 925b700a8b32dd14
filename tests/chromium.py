"""A page as a browser sees it: Debian's Chromium, without a window and without a network."""

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Its path. Skips the test where there is none, but not in CI.

    `.ci/run` says that it is one by GOPO_NEEDS_BROWSER: with CI set, Hypothesis would try the same examples every time.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing = f"none of {', '.join(NAMES)} is installed"
        if os.environ.get("CI") or os.environ.get("GOPO_NEEDS_BROWSER"):
            pytest.fail(f"{missing}; .ci/run installs it")
        pytest.skip(missing)
    return found


def _open(page: Path, profile: Path, *options: str) -> str:
    command = [
        *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--virtual-time-budget=10000"),
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dump(page: Path, profile: Path) -> str:
    """The document after it was loaded, and after any script of it has run."""
    return _open(page, profile, "--dump-dom")


def screenshot(page: Path, profile: Path, path: Path, *options: str) -> None:
    """The upper part of ``page``, 1280 pixels wide."""
    _open(page, profile, "--window-size=1280,2400", f"--screenshot={path}", *options)


class Document(HTMLParser):
    """Tags, their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        """Remember."""
        self._texts.append(data)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._texts)
