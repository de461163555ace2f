"""Machines that this one is not: without a compiler, without what only Linux has. Simulated, see other_machine.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import losses, tensors, train_here

from minitf.errors import DeviceError
from minitf.system.hardware import choose_device, compiler_missing

ELSEWHERE = Path(__file__).parent / "other_machine.py"
FACTS = "no_unix,no_proc,no_links,no_compiler"


def run_elsewhere(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ELSEWHERE), FACTS, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_run_elsewhere_is_the_same_bit_for_bit_and_resumes(workdir: Path, tiny: list[str]) -> None:
    kept = [*tiny, "trainer.save_every=2", "trainer.keep_checkpoints=1"]
    assert train_here(*kept, "trainer.max_steps=4", "run_dir=here") == 0
    assert train_here("resume=here", "trainer.max_steps=6") == 0
    run_elsewhere("minitf.train", *kept, "trainer.max_steps=4", "run_dir=there")
    run_elsewhere("minitf.train", "resume=there", "trainer.max_steps=6")
    assert losses("there") == losses("here")
    found, expected = tensors("there"), tensors("here")
    assert all((found[name] == value).all() for name, value in expected.items())

    checkpoints = sorted(path.name for path in Path("there/checkpoints").iterdir())
    assert checkpoints == ["best", "latest", "step_00000006"]  # copies, where there are no links
    answer = run_elsewhere("minitf.generate", "The cat", "--run", "there", "--max-tokens", "4").stdout
    assert answer.startswith("The cat")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["auto", pytest.param("true", marks=pytest.mark.slow)])
def test_without_a_compiler_the_model_trains_as_written(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    monkeypatch.setenv("MINITF_CACHE", str(workdir / "cache"))  # no library compiled before
    automatic = [argument for argument in tiny if not argument.startswith("trainer.compile=")]
    settings = [*automatic, f"trainer.compile={compiled}", "trainer.max_steps=2"]
    done = run_elsewhere("minitf.train", *settings, "run_dir=there")
    line = next(line for line in done.stderr.splitlines() if line.startswith("backend"))
    assert "as written" in line
    assert ("no C++ compiler found" if compiled == "true" else "torch.compile does not pay in") in line


def test_mps_is_chosen_where_there_is_no_cuda_and_is_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="device mps: PyTorch finds no such device"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    assert compiler_missing(torch.device("mps")) == "torch.compile is not used on mps"
