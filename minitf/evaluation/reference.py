"""Scores in reference of a checkpoint, and of several runs that differ in their seeds."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.sources.references import LANGUAGES, REFERENCES, cases_of
from minitf.errors import RequestError
from minitf.interpretability.reference import LEARNT, ReferenceScores, describe_heads, measure
from minitf.interpretability.reference_cases import tokenized


def own_exercise(checkpoint: Checkpoint) -> str | None:
    """The exercise that a checkpoint was trained on, as `evaluate_reference` takes it; None for another text."""
    data = checkpoint.state.get("data", {})
    name, language = data.get("source"), data.get("language", "en")
    return f"{name}:{language}" if name in REFERENCES and language in LANGUAGES else None


def evaluate_reference(checkpoint: Checkpoint, exercise: str) -> ReferenceScores:
    """The scores of any model on the held-out sentences of `exercise`, a name or NAME:LANGUAGE.

    RequestError if there is no such exercise, or if the model cannot read its sentences.
    """
    name, _, language = exercise.partition(":")
    if name not in REFERENCES or (language or "en") not in LANGUAGES:
        known = ", ".join(f"{one}, {one}:zh" for one in REFERENCES)
        raise RequestError(f"--reference {exercise} is not known; one of {known}")
    cases = tokenized(cases_of(name, language or "en"), checkpoint.tokenizer, checkpoint.model.config.context_length)
    return measure(checkpoint.model, cases)


def compare_seeds(folder: Path) -> list[dict[str, Any]]:
    """A row for each run in `folder` that trained on an exercise in reference: its last scores, and when it had learnt.

    `learnt_at` is the first measured step from which on `exact` was at least LEARNT; None: it never was. RequestError
    if there is no such run.
    """
    rows = [_seed_row(path) for path in sorted(folder.glob("**/metrics.jsonl"))]
    found = [row for row in rows if row]
    if not found:
        raise RequestError(f"--seeds {folder}: no run in it has scores in reference; name the folder of a sweep")
    return found


def _seed_row(path: Path) -> dict[str, Any] | None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    looks = [line for line in lines if line.get("split") == "reference"]
    if not looks:
        return None
    learnt_at = None
    for look in reversed(looks):
        if look["exact"] < LEARNT:
            break
        learnt_at = look["step"]
    return {"run": path.parent.name, **looks[-1], "learnt_at": learnt_at}


def seeds_table(rows: list[dict[str, Any]]) -> str:
    """One line a run, and what holds for all of them."""
    width = max(3, *(len(row["run"]) for row in rows)) + 2
    columns = ("exact", "weight", "pick", "knockout", "control")
    lines = [f"{'run':{width}}{'learnt at':>10}" + "".join(f"{name:>10}" for name in columns) + "  heads"]
    for row in rows:
        at = "never" if row["learnt_at"] is None else f"{row['learnt_at']:,}"
        values = "".join(f"{row[name]:>10.3f}" for name in columns)
        lines.append(f"{row['run']:{width}}{at:>10}{values}  {describe_heads([(a, b) for a, b in row['heads']])}")
    return "\n".join([*lines, *_summary(rows)])


def _summary(rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> list[str]:
    learnt = [row for row in rows if row["learnt_at"] is not None]
    if not learnt:
        return [f"learnt in 0 of {len(rows)} runs"]
    alone = sum(len(row["heads"]) == 1 for row in learnt)
    steps = statistics.median(row["learnt_at"] for row in learnt)
    return [
        f"learnt in {len(learnt)} of {len(rows)} runs (median: at step {steps:,.0f}), by one head in {alone} of them"
    ]
