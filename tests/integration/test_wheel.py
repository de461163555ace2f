"""The wheel is complete: unpacked alone, its console commands work in an empty folder."""

import configparser
import os
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from minitf.config.presets import COMMANDS as PRESETS

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "generate", "evaluate", "attention", "export", "benchmark", "completion")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel: the package with its data, and entry_points.txt."""
    pytest.importorskip("hatchling", reason="install the extra minitf[test]")
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("minitf-*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


CALLS = """
import importlib, sys
for words in {calls}:
    sys.argv = [f"minitf-{{words[0]}}", *words[1:]]
    module, function = {entries}[sys.argv[0]].split(":")
    try:
        status = getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        status = end.code
    if status:
        sys.exit(status)
"""


def run(installed: Path, place: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run console commands as their scripts do, with minitf from the unpacked wheel."""
    entries = configparser.ConfigParser()
    (file,) = installed.glob("minitf-*.dist-info/entry_points.txt")
    entries.read(file)
    calls = [shlex.split(command) for command in commands]
    code = CALLS.format(calls=calls, entries=dict(entries["console_scripts"]))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=place, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def run_module(installed: Path, place: Path, command: str) -> subprocess.CompletedProcess[str]:
    """`python -m minitf.COMMAND`, with minitf from the unpacked wheel."""
    return subprocess.run(
        [sys.executable, "-m", *shlex.split(f"minitf.{command}")], cwd=place,
        env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_every_console_command_prints_its_help(installed: Path, workdir: Path) -> None:
    done = run(installed, workdir, *(f"{command} --help" for command in COMMANDS))
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"minitf-{command}" in done.stdout or command == "train"
    assert "trainer.max_steps" in done.stdout
    assert list(workdir.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_module_with_a_help(installed: Path, workdir: Path, command: str) -> None:
    done = run_module(installed, workdir, f"{command} --help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower() or "trainer.max_steps" in done.stdout
    assert list(workdir.iterdir()) == []


def test_every_script_is_a_command(installed: Path) -> None:
    development = {"fuzz", "crash_test"}
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - development < set(COMMANDS) == set(PRESETS)
    for command in COMMANDS:
        name = installed / "minitf" / command
        assert name.with_suffix(".py").is_file() or (name / "__main__.py").is_file()


@pytest.mark.slow
def test_a_model_is_trained_and_used_in_an_empty_folder(installed: Path, workdir: Path, tiny: list[str]) -> None:
    settings = [word for word in tiny if not word.startswith("data")]
    done = run(installed, workdir, shlex.join(["train", "experiment=quick", *settings, "trainer.eval_tokens=1000"]))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in workdir.iterdir()] == ["runs"]
    assert "python -m minitf.generate" in done.stderr
    used = run(installed, workdir, "generate And --max-tokens 4", "attention 'And God' --out look.html")
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("And"), used.stderr
    assert "<canvas" in (workdir / "look.html").read_text() or (workdir / "look.html").stat().st_size > 50_000
    commands = ["evaluate --json --max-tokens 200", "completion bash", "attention 'And God' --json"]
    if find_spec("gguf"):
        commands.append("export --out model.gguf")
    for command in commands:
        used = run_module(installed, workdir, command)
        assert used.returncode == 0, used.stderr
    assert not find_spec("gguf") or (workdir / "model.gguf").stat().st_size > 1000
    wrong = run(installed, workdir, "train model=huge")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
