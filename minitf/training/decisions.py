"""What a run measured and then decided: kept beside it, so that a resumed run computes with the same arithmetic."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from minitf.errors import MinitfError
from minitf.system.files import write_whole
from minitf.system.safe_io import read_json

NAME = "choices.json"


@dataclass
class Choices:
    """Empty where nothing was decided yet."""

    device: str = ""  # type of the device
    precision: str = ""  # bf16 or fp32
    compile: str = ""  # native, true or false: by our kernels, compiled, neither
    num_processes: int = 0  # that train together: sums are split among them, ...
    num_threads: int = 0  # ... and in each of them among its threads of the CPU
    micro_batch_size: int = 0  # sequences each computes at a time, whose gradients are summed
    torch_version: str = ""
    decided_at: int = 0  # step from which on this holds: 0, or where the run was told to end elsewhere
    num_steps: int = 0  # of the whole run, as the warm-up's speed had it
    corrected_at: int = 0  # step at which a run by the clock corrected that, 0: not
    corrected_num_steps: int = 0  # to so many
    finished: bool = False  # whether everything that follows the last step was written

    @classmethod
    def load(cls, run_dir: Path) -> "Choices":
        """Those of a run; empty ones of a run that died before it decided."""
        path = run_dir / NAME
        if not path.exists():
            return cls()
        content = read_json(path)
        known = {item.name: content[item.name] for item in fields(cls) if item.name in content}
        choices = cls(**known)
        for item in fields(cls):
            value, default = getattr(choices, item.name), item.default
            if type(value) is not type(default) or (isinstance(value, int) and not 0 <= value < 1 << 53):
                raise MinitfError(
                    f"{path} is damaged: {item.name} is {str(value)[:50]!r}; remove the file to decide anew"
                )
        return choices

    def save(self, run_dir: Path) -> None:
        """Keep them with the run; raises OSError."""
        write_whole(run_dir / NAME, json.dumps(asdict(self), indent=2) + "\n")

    def here(self, device: torch.device, dtype: torch.dtype, micro_batch_size: int, num_processes: int = 1) -> None:
        """Note what this process computes with, how much at a time, and beside how many."""
        self.micro_batch_size, self.num_processes = micro_batch_size, num_processes
        self.device, self.precision = device.type, "bf16" if dtype.itemsize == 2 else "fp32"
        self.num_threads, self.torch_version = torch.get_num_threads(), torch.__version__

    def differences(self, earlier: "Choices") -> list[str]:
        """What is not as it was for `earlier`, in words: the text's order stays, the arithmetic may differ."""
        names = {"device": "device", "precision": "precision", "compile": "compile", "num_processes": "processes",
            "num_threads": "threads", "micro_batch_size": "sequences at a time", "torch_version": "torch"}  # fmt: skip
        pairs = ((words, getattr(earlier, name), getattr(self, name)) for name, words in names.items())
        return [f"{words} {now} instead of {before}" for words, before, now in pairs if before and before != now]
