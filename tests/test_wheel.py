"""The wheel works anywhere: built, unpacked alone, started by its console commands in an empty folder."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "generate", "evaluate", "attention", "export", "benchmark")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip makes of the wheel: the package with its data, and entry_points.txt."""
    pytest.importorskip("hatchling", reason="install the extra minitf[test]")
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("minitf-*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def run(installed: Path, place: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A console command as its script calls it, with only the unpacked wheel to find minitf in."""
    entries = configparser.ConfigParser()
    (file,) = installed.glob("minitf-*.dist-info/entry_points.txt")
    entries.read(file)
    module, function = entries["console_scripts"][f"minitf-{command}"].split(":")
    code = f"import sys; sys.argv[0] = 'minitf-{command}'; from {module} import {function}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=place, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_console_command_says_how_it_is_used(installed: Path, workdir: Path, command: str) -> None:
    done = run(installed, workdir, command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"minitf-{command}" in done.stdout or command == "train"
    assert list(workdir.iterdir()) == []


@pytest.mark.slow
def test_a_model_is_trained_and_used_in_an_empty_folder(installed: Path, workdir: Path, tiny: list[str]) -> None:
    settings = [word for word in tiny if not word.startswith("data")]
    done = run(installed, workdir, "train", "experiment=quick", *settings)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in workdir.iterdir()] == ["runs"]
    assert "python -m minitf.generate" in done.stderr
    written = run(installed, workdir, "generate", "And", "--max-tokens", "4")
    assert written.stdout.startswith("And"), written.stderr
    looked = run(installed, workdir, "attention", "And God", "--out", "look.html")
    assert looked.returncode == 0, looked.stderr
    assert "<canvas" in (workdir / "look.html").read_text() or (workdir / "look.html").stat().st_size > 50_000
    wrong = run(installed, workdir, "train", "model=huge")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
