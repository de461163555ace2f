"""What a run measured and decided, in `decisions.json`: a resumed run computes with the same arithmetic."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
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

Switches = tuple[tuple[int, str, int], ...]


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
    switches: Switches = ()  # (step, backend, threads): measured again, others are used from there on
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
        known |= {"plans": _plans(content), "switches": _switches(content)}
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
        rows = {name: tuple(tuple(row) for row in content[name]) for name in ("plans", "switches")}
        return cls(**{**content, **rows})

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
    if not _are_rows(plans, int, int) or not all(step <= num_steps for step, num_steps in plans):
        return None
    if plans and (plans[0][0] or not plans[0][1]):
        return None
    return tuple((step, num_steps) for step, num_steps in plans)


def _switches(content: Mapping[str, Any]) -> Switches | None:
    """The switches of a file; None if it is damaged."""
    switches = content.get("switches", [])
    return tuple((row[0], row[1], row[2]) for row in switches) if _are_rows(switches, int, str, int) else None


def _are_rows(rows: Any, *kinds: type) -> bool:
    """Whether `rows` is a list of lists of these kinds, each with a larger step than the one before as its first."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    if any([type(value) for value in row] != list(kinds) for row in rows):
        return False
    numbers = [value for row in rows for value in row if type(value) is int]
    return all(0 <= number < MAX_NUMBER for number in numbers) and all(a[0] < b[0] for a, b in pairwise(rows))


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
