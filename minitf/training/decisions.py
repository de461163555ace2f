"""What a run measured and decided, in `decisions.json`: a resumed run computes with the same arithmetic."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minitf.backends.sdpa import EXPLICIT_MAX_LENGTH
from minitf.errors import MinitfError
from minitf.model import ModelConfig
from minitf.system.files import write_whole
from minitf.system.safe_io import read_json
from minitf.training.budget import Plans

FILE_NAME = "decisions.json"
OLD_FILE_NAME = "choices.json"  # of versions before 2026-12
MAX_NUMBER = 1 << 53


@dataclass(frozen=True)
class RunDecisions:
    """Empty fields are not decided yet."""

    device: str = ""  # type of the device
    precision: str = ""  # bf16 or fp32
    backend: str = ""  # cpu, triton, compile, sdpa or reference
    num_processes: int = 0  # gradients are summed over these,
    num_threads: int = 0  # in each of them over its CPU threads,
    micro_batch_size: int = 0  # and over micro-batches of this many sequences
    torch_version: str = ""
    decided_at: int = 0  # the step from which on this holds: 0, or where a resumed run was given another end
    plans: Plans = ()  # of its number of steps; the first is that of step 0
    finished: bool = False  # whether everything after the last step was written

    @classmethod
    def load(cls, run_dir: Path, model: ModelConfig) -> "RunDecisions":
        """Those of a run; empty if it died before it decided. Raises MinitfError if the file is damaged.

        `model` tells which path an old file means by "not compiled".
        """
        path, old_path = run_dir / FILE_NAME, run_dir / OLD_FILE_NAME
        if path.exists():
            return cls._from_json(path, read_json(path))
        if old_path.exists():
            return cls._from_json(old_path, _renamed(read_json(old_path), model))
        return cls()

    @classmethod
    def _from_json(cls, path: Path, content: dict[str, Any]) -> "RunDecisions":
        known = {item.name: content[item.name] for item in fields(cls) if item.name in content}
        known |= {"plans": _plans(content)}
        for item in fields(cls):
            value = known.get(item.name, item.default)
            if type(value) is not type(item.default) or (isinstance(value, int) and not 0 <= value < MAX_NUMBER):
                raise MinitfError(
                    f"{path} is damaged: {item.name} is {str(value)[:50]!r}; remove the file to decide anew"
                )
        return cls(**known)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "RunDecisions":
        """The decisions whose `asdict` went through JSON."""
        return cls(**{**content, "plans": tuple((step, num_steps) for step, num_steps in content["plans"])})

    def save(self, run_dir: Path) -> None:
        """Write `decisions.json`; raises OSError."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items())
        write_whole(run_dir / FILE_NAME, "{\n" + ",\n".join(lines) + "\n}\n")

    def changes(self, before: "RunDecisions") -> list[str]:
        """Descriptions of what differs from an earlier start and lets sums be rounded differently."""
        names = {
            "device": "device",
            "precision": "precision",
            "backend": "backend",
            "num_processes": "processes",
            "num_threads": "threads",
            "micro_batch_size": "sequences at a time",
            "torch_version": "torch",
        }
        pairs = ((name, getattr(before, field), getattr(self, field)) for field, name in names.items())
        return [f"{name} {now} instead of {earlier}" for name, earlier, now in pairs if earlier and earlier != now]


def _plans(content: Mapping[str, Any]) -> Plans | None:
    """The plans of a file, also of one before 2026-12, which held two numbers of steps; None if it is damaged."""
    old = content.get("corrected_num_steps" if content.get("corrected_at") else "num_steps")
    plans = content.get("plans", [[0, old]] if old else [])
    before = -1
    for plan in plans if isinstance(plans, list) else [None]:
        if not (isinstance(plan, list) and [type(number) for number in plan] == [int, int]):
            return None
        step, num_steps = plan
        if not before < step <= num_steps < MAX_NUMBER or num_steps < 1 or (before < 0 < step):
            return None
        before = step
    return tuple((step, num_steps) for step, num_steps in plans)


def _renamed(content: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The content of an old file, in which `compile` was native, true or false."""
    device = content.get("device")
    backends = {
        "native": "cpu" if device == "cpu" else "triton",
        "true": "compile",
        "false": _uncompiled(model, str(device)),
    }
    compiled = content.get("compile", "")
    return {**content, "backend": backends.get(compiled, compiled) if isinstance(compiled, str) else compiled}


def _uncompiled(model: ModelConfig, device: str) -> str:
    """The backend that earlier versions used without compilation: the explicit steps or PyTorch's fused attention."""
    if model.attention == "auto":
        return "reference" if device == "cpu" and model.context_length <= EXPLICIT_MAX_LENGTH else "sdpa"
    return "reference" if model.attention == "explicit" else "sdpa"
