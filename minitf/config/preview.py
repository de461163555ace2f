"""What a run is going to do and how long it takes, said before PyTorch is imported, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from minitf.config.presets import folders, options


def preview(overrides: Sequence[Override], flags: Sequence[str] = ()) -> list[str]:
    """A line on the subject of the run and one on its time, from the command line and the presets it names."""
    chosen = {one.key_or_group: one.value() for one in overrides if not one.is_delete()}
    subject = _subject(chosen, flags)
    return [subject, f"{_time(chosen, flags)} of training, and some seconds before and after; Ctrl-C saves and stops"]


def _subject(chosen: dict[str, Any], flags: Sequence[str]) -> str:
    if experiment := chosen.get("experiment"):
        return f"{experiment}: {options('experiment', flags).get(str(experiment), '')}"
    if files := chosen.get("data.files"):
        return f"training on {', '.join(map(str, files)) if isinstance(files, list) else files}"
    described = options("data", flags).get(str(chosen.get("data", "kjv")), "")
    return f"training on {described.partition(';')[0]}"


def _time(chosen: dict[str, Any], flags: Sequence[str]) -> str:
    """The limit of the run: steps, minutes, or both."""
    limits = _preset("trainer", chosen.get("trainer", "default"), flags)
    limits |= _experiment(chosen.get("experiment"), flags)
    limits |= {key.removeprefix("trainer."): value for key, value in chosen.items() if key.startswith("trainer.")}
    steps, minutes = limits.get("max_steps"), limits.get("max_minutes", "auto")
    if minutes in ("auto", None):
        minutes = None if steps else 3  # as in TrainerConfig
    parts = [f"{steps:,} steps"] if isinstance(steps, int) else []
    return " or ".join([*parts, *([f"{minutes:g} min"] if isinstance(minutes, int | float) else [])])


def _experiment(name: object, flags: Sequence[str]) -> dict[str, Any]:
    """The settings of the trainer in an experiment, and in those it is based on."""
    preset = _preset("experiment", name, flags)
    bases = [
        _experiment(base, flags) for base in preset.get("defaults", []) if isinstance(base, str) and base != "_self_"
    ]
    return {key: value for part in (*bases, preset.get("trainer") or {}) for key, value in part.items()}


def _preset(group: str, name: object, flags: Sequence[str]) -> dict[str, Any]:
    """The content of a preset; empty if there is none of this name."""
    paths = [Path(folder) / group / f"{name}.yaml" for folder in folders(flags)]
    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return dict(found[0] or {}) if found else {}
