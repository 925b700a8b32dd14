"""What is shipped: configs in the wheel, all files in the sdist, a Dockerfile whose commands run; versions agree."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import gopo_lightning

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, which was built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)], cwd=ROOT, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=unpacked, check=True
    )
    return folder


def tracked(*folders: str) -> set[str]:
    """Files of the repository; in an unpacked sdist, all that are there."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    files = [path for folder in folders or (".",) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_its_configs(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {f"gopo_lightning/{name}" for name in tracked("configs") if not name.startswith("configs/study/")}
    assert inside == tracked("gopo_lightning") | configs
    assert len(configs) > 15


def test_the_sdist_has_every_file_of_the_repository(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() - {".gitignore"} <= inside


def test_versions_agree() -> None:
    version = gopo_lightning.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    sections = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == version and sections == sorted(sections, reverse=True)


def test_classifiers_name_the_python_that_runs_the_tests_and_no_other() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert named == [here] and PROJECT["project"]["requires-python"] == f">={here}"
    assert f"FROM python:{here}-" in DOCKERFILE


def test_the_lock_is_within_the_ranges(built: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    project = PROJECT["project"]
    needed = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    needed += [text for name in ("quickstart", "judge", "dev") for text in project["optional-dependencies"][name]]
    for requirement in map(Requirement, needed):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.slow
@pytest.mark.timeout(1800)  # pip asks the index for every package
def test_the_commands_of_the_dockerfile_run(tmp_path: Path) -> None:
    """In a fresh environment that sees the packages of this one, so that pip checks them against the lock."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    image = tmp_path / "image"
    image.mkdir()
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"PATH": path, "TORCH_INDEX": ""}
    commands = re.findall(r"^(COPY|RUN|ENTRYPOINT) (.*)$", DOCKERFILE, re.M)
    assert [name for name, _ in commands].count("RUN") == 1
    for name, arguments in commands:
        if name == "COPY":
            *sources, target = arguments.split()
            copy = ["cp", "-r", *sources, str(image / target)]
            subprocess.run(copy, cwd=ROOT, check=True)
        elif name == "RUN":
            subprocess.run(["bash", "-ec", arguments], cwd=image, env=variables, check=True)
    entry = yaml.safe_load(dict(commands)["ENTRYPOINT"])
    assert entry == ["gopo-lightning"]
    listed = subprocess.run(
        [environment / "bin" / entry[0], "config", "list"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert "quickstart/gopo" in listed.stdout and "study/" not in listed.stdout, listed.stderr
