"""What is built from the project: wheel and sdist, the image's recipe, and the versions that are admitted."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.copies import ROOT, copy_project

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "rlhf_cli")
BUILD = """
from setuptools import build_meta
print(build_meta.build_wheel("out"), build_meta.build_sdist("out"))
"""


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of the project, by setuptools itself: no network."""
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    wheel, sdist = done.stdout.split()[-2:]
    return folder / "out" / wheel, folder / "out" / sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("built")
    copy_project(BUILT_FROM, folder)
    return build(folder)


def test_the_wheel_holds_the_package_whole(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "rlhf = rlhf_cli.cli.app:main" in wheel.read(entry).decode()
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rlhf_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {"rlhf_cli/py.typed", "rlhf_cli/cli/starter/Makefile", "rlhf_cli/cli/starter/gitignore"} <= ours


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    with zipfile.ZipFile(build(folder)[0]) as again, zipfile.ZipFile(built[0]) as wheel:
        assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in wheel.infolist()}


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {"tensorboard", "wandb", "trackio", "vllm", "docs", "dev"}


def test_the_floor_is_what_is_admitted() -> None:
    """constraints-floor.txt pins the oldest version of each dependency; torch's is told in docs/versions.md."""
    lines = (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    admitted = dict(need.split(">=") for need in PROJECT["dependencies"])
    assert pins.keys() == admitted.keys()
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for name, floor in admitted.items():
        if name != "torch":
            assert (pins[name] + ".0").startswith(floor + "."), name
        assert f"| {name} | {floor} | {pins[name]} |" in page


def test_the_newest_versions_are_those_of_the_page() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name.lower(): version for name, version in (line.split("==") for line in lines if line[0] != "#")}
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9]+) \| \S+ \| \S+ \| (\S+) \|$", page, re.M)
    assert len(rows) == len(PROJECT["dependencies"])
    assert {name: pins[name] for name, _ in rows} == dict(rows)


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", image, re.M) for name in line.split()}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER rlhf$", image, re.M)
    assert image.index("USER rlhf") < image.index('ENTRYPOINT ["rlhf"]')
