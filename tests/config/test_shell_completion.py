"""Shell completion: settings, presets, flags and runs, and the code that shells evaluate."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitf.config.presets import COMMANDS, all_keys
from minitf.config.shell_completion import candidates, main, script
from minitf.errors import RequestError


def test_settings_presets_and_runs_are_completed(workdir: Path) -> None:
    assert candidates("python -m minitf.train trainer.prec") == ["trainer.precision="]
    assert candidates("python3 -m minitf.train model=nano trainer.precision=b") == ["trainer.precision=bf16"]
    assert candidates("minitf-train model=") == [f"model={size}" for size in ("auto", "gpt2", "mini", "nano", "small")]
    assert candidates("/some/bin/python -m minitf.train data.streaming=") == [
        "data.streaming=true", "data.streaming=false"
    ]  # fmt: skip
    every = {word.rstrip("=") for word in candidates("minitf-train ")}
    assert every == {*all_keys(), "experiment"} - {"attention"}
    (workdir / "runs/kjv/one/checkpoints/latest").mkdir(parents=True)
    assert candidates("minitf-train resume=") == ["resume=latest", "resume=runs/kjv/one"]


def test_flags_and_their_values_are_completed(workdir: Path) -> None:
    assert candidates("python scripts/generate.py --max") == ["--max-tokens"]
    assert candidates("minitf-export --type ") == ["f32", "f16", "q8_0"]
    assert candidates("python -m minitf.evaluate --run ") == ["latest"]
    assert candidates("minitf-train --cfg ") == ["job", "hydra", "all"]
    assert candidates("minitf-train --conf") == ["--config-dir", "--config-name", "--config-path"]
    assert candidates("minitf-train -m trainer.dry_run=t") == ["trainer.dry_run=true"]
    for command in COMMANDS:
        assert "--help" in candidates(f"minitf-{command} --"), command
        assert len(candidates(f"minitf-{command} --")) > 2 or command == "completion"
    for line in ("python scripts/other.py --", "python -m http.server --", "python ", "minitf-generate The"):
        assert candidates(line) == []


def test_presets_of_the_users_own_are_completed(workdir: Path) -> None:
    (workdir / "my/experiment").mkdir(parents=True)
    (workdir / "my/experiment/mine.yaml").write_text("# mine\n")
    assert candidates("minitf-train -cd my experiment=m") == ["experiment=modern_english", "experiment=mine"]
    assert candidates("minitf-train experiment=m") == ["experiment=modern_english"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_code_is_valid_in_its_shell(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "file").write_text(script(shell))
    assert subprocess.run([shell, "-n", tmp_path / "file"], capture_output=True).stderr == b""


def test_an_unknown_shell_is_named_and_hydras_flag_works(capsys: pytest.CaptureFixture[str]) -> None:
    from minitf.train import main as train

    with pytest.raises(RequestError, match="bash, zsh, fish"):
        main(["tcsh"])
    assert train(["--shell-completion", "install=bash"]) == 0
    assert capsys.readouterr().out == script("bash")


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("python -m minitf.train model.num_l", "model.num_layers="),
        ("python -m minitf.train trainer.precision=f", "fp32"),  # what stands before the "=" stays
        ("minitf-generate --expl", "--explain"),
        ("python other.py --x", "theirs"),
    ],
)
def test_bash_completes(line: str, replies: str) -> None:
    """For commands that are not minitf's, the completion of `python` that was installed before still answers."""
    words = f'COMP_LINE="{line}" COMP_POINT=${{#COMP_LINE}} COMP_WORDBREAKS=$" \\t\\n=:"'
    before = "theirs() { COMPREPLY=(theirs); }; complete -F theirs python"
    code = f'{before}; eval "$({sys.executable} -m minitf.completion bash)"; {words}; _minitf; echo ${{COMPREPLY[@]}}'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == [replies], done.stderr
