"""Runs of a sweep side by side: what each came to, read from its directory, and a table in which seeds are pooled."""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitf.config.schema import flat, load_config
from minitf.errors import RequestError
from minitf.interpretability.heads import PATTERN_THRESHOLD
from minitf.interpretability.reference import LEARNT, describe_heads
from minitf.system.safe_io import read_json

WIDTH = 80
LABEL_WIDTH = 22  # of the settings; longer ones stand on a line of their own
# Not compared: runs that differ in these alone are repetitions.
POOLED = ("seed", "run_dir", "resume")
REFERENCE = ("exact", "weight", "pick", "knockout", "control")


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `values` has what the run measured, and a step at which nothing happened is not in it.

    bits_per_byte: of the last held-out evaluation; first_token: the weight of a query on the first token, mean over
    all heads, at the last look; induction_at: the first look from which on some head is an induction head;
    tokens_per_s: over all training; learnt_at and REFERENCE: of a run on an exercise in reference.
    """

    run: str
    settings: Mapping[str, Any]
    finished: bool
    values: Mapping[str, float]
    reference: Mapping[str, Any] = field(default_factory=dict)  # the last row of its exercise


def read_outcome(run_dir: Path) -> Outcome:
    """Of a run that may have failed. Raises MinitfError if its config is damaged."""
    config, decisions = run_dir / "config.yaml", run_dir / "decisions.json"
    values = dict(head_results(run_dir))
    reference: list[Mapping[str, Any]] = []
    for row in rows_of(run_dir / "metrics.jsonl"):
        if row["split"] == "val":
            values["bits_per_byte"] = row["bits_per_byte"]
        elif row["split"] == "train" and row.get("train_s"):
            values["tokens_per_s"] = row["tokens"] / row["train_s"]
        elif row["split"] == "reference":
            reference.append(row)
    if reference:
        values |= {name: reference[-1][name] for name in REFERENCE}
        learnt_at = settled_at(((row["step"], row["exact"]) for row in reference), LEARNT)
        values |= {} if learnt_at is None else {"learnt_at": learnt_at}
    finished = bool(read_json(decisions).get("finished", True)) if decisions.exists() else True
    settings = flat(load_config(config)) if config.exists() else {}
    return Outcome(run_dir.name, settings, finished, values, reference[-1] if reference else {})


def results_of(run_dir: Path) -> dict[str, float]:
    """The columns of `table` that only the whole run has: in HParams next to the held-out numbers."""
    outcome = read_outcome(run_dir)
    columns = REFERENCE_COLUMNS if outcome.reference else TEXT_COLUMNS
    return {name: outcome.values[name] for name, *_ in columns if name in outcome.values and name != "bits_per_byte"}


def head_results(run_dir: Path) -> dict[str, float]:
    """first_token and induction_at of a run, as far as it scored its heads."""
    looks = {row["step"]: row["scores"] for row in rows_of(run_dir / "attention.jsonl") if row.get("scores")}
    if not looks:
        return {}
    last = looks[max(looks)]
    found = {"first_token": statistics.fmean(weight for layer in last["first_token"] for weight in layer)}
    best = ((step, max(map(max, scores["induction"]))) for step, scores in sorted(looks.items()))
    at = settled_at(best, PATTERN_THRESHOLD)
    return found if at is None else found | {"induction_at": at}


def settled_at(points: Iterable[tuple[int, float]], threshold: float) -> int | None:
    """The first step from which on the values stay at or above the threshold; None if the last one is below it."""
    at = None
    for step, value in points:
        at = (step if at is None else at) if value >= threshold else None
    return at


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl or attention.jsonl, without a line that was cut when the run was killed."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield {"split": "", **row}


def outcomes_in(folder: Path) -> list[Outcome]:
    """Of all runs in `folder`, such as a sweep's. RequestError if there is none."""
    found = [read_outcome(path.parent) for path in sorted(folder.glob("**/metrics.jsonl"), key=_in_order)]
    found = [outcome for outcome in found if outcome.values]
    if not found:
        raise RequestError(f"--seeds {folder}: no run in it has results; name the folder of a sweep")
    return found


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Sorts 10_... after 9_..."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


# -- the table ---------------------------------------------------------------------------------------------------------


def _spread(decimals: int) -> Callable[[list[float], int], str]:
    """Mean and standard deviation."""

    def cell(values: list[float], num_runs: int) -> str:
        spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{decimals}f}{spread}"

    return cell


def _step(values: list[float], num_runs: int) -> str:
    """The median, and in how many runs it happened unless in all."""
    share = f" ({len(values)}/{num_runs})" if len(values) < num_runs else ""
    return f"{statistics.median(values):,.0f}{share}"


def _speed(values: list[float], num_runs: int) -> str:
    return f"{statistics.median(values):,.0f}"


# (value, heading, width, its text)
TEXT_COLUMNS = (
    ("bits_per_byte", "bits/byte", 16, _spread(3)),
    ("first_token", "first token", 16, _spread(3)),
    ("induction_at", "induction", 13, _step),
    ("tokens_per_s", "tokens/s", 10, _speed),
)
REFERENCE_COLUMNS = (
    ("learnt_at", "learnt at", 12, _step),
    ("exact", "exact", 15, _spread(3)),
    ("knockout", "knockout", 15, _spread(3)),
    ("tokens_per_s", "tokens/s", 10, _speed),
)


def varied(outcomes: Sequence[Outcome]) -> list[str]:
    """The settings in which the runs differ, without those that follow from another, as a head's width does."""
    found: dict[tuple[int, ...], str] = {}
    keys = dict.fromkeys(key for outcome in outcomes for key in outcome.settings)
    for key in keys:
        values = [str(outcome.settings.get(key)) for outcome in outcomes]
        if key not in POOLED and len(set(values)) > 1:
            found.setdefault(tuple(values.index(value) for value in values), key)
    return list(found.values())


def pooled(outcomes: Sequence[Outcome]) -> tuple[list[str], dict[tuple[str, ...], list[Outcome]]]:
    """The settings in which the runs differ, and the runs by the values of these."""
    keys = varied(outcomes)
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(str(outcome.settings.get(key, "")) for key in keys), []).append(outcome)
    return keys, groups


def table(outcomes: Sequence[Outcome], failed: Sequence[str] = ()) -> list[str]:
    """Lines of at most WIDTH columns: finished runs, seeds pooled; then the names of the others, and of `failed`."""
    finished = [outcome for outcome in outcomes if outcome.finished]
    columns = REFERENCE_COLUMNS if any(outcome.reference for outcome in finished) else TEXT_COLUMNS
    keys, groups = pooled(finished)
    heading = " ".join(key.rpartition(".")[2] for key in keys) or "all"
    lines = _line(heading, "runs", [f"{name:>{width}}" for _, name, width, _ in columns]) if finished else []
    for label, group in groups.items():
        cells = []
        for key, _, width, text in columns:
            values = [outcome.values[key] for outcome in group if key in outcome.values]
            cells.append(f"{text(values, len(group)) if values else '-':>{width}}")
        lines += _line(" ".join(value or "-" for value in label) or "all", str(len(group)), cells)
    names = dict.fromkeys([*(outcome.run for outcome in outcomes if not outcome.finished), *failed])
    return lines + [f"failed or unfinished: {name}" for name in names]


def _line(label: str, num_runs: str, cells: Sequence[str]) -> list[str]:
    numbers = f"{num_runs:>5}{''.join(cells)}"
    if len(label) <= LABEL_WIDTH - 1:
        return [f"{label:<{WIDTH - len(numbers)}}{numbers}"]
    return [label, f"{'':{WIDTH - len(numbers)}}{numbers}"]


def legend(outcomes: Sequence[Outcome]) -> str:
    """What the numbers of `table` are."""
    if any(outcome.reference for outcome in outcomes):
        return "mean ± standard deviation over seeds; learnt at: median step; scores: see --reference"
    return (
        "mean ± standard deviation over seeds; first token: its weight, mean over heads;\n"
        "induction: median step at which some head is an induction head"
    )


def seeds_table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each run on an exercise in reference, and what holds for all of them; nothing for other runs."""
    rows = [outcome for outcome in outcomes if outcome.reference]
    if not rows:
        return []
    width = max(3, *(len(row.run) for row in rows)) + 2
    lines = [f"{'run':{width}}{'learnt at':>10}" + "".join(f"{name:>10}" for name in REFERENCE) + "  heads"]
    for row in rows:
        at = f"{row.values['learnt_at']:,}" if "learnt_at" in row.values else "never"
        values = "".join(f"{row.values[name]:>10.3f}" for name in REFERENCE)
        heads = describe_heads([(layer, head) for layer, head in row.reference["heads"]])
        lines.append(f"{row.run:{width}}{at:>10}{values}  {heads}")
    learnt = [row for row in rows if "learnt_at" in row.values]
    if not learnt:
        return [*lines, f"learnt in 0 of {len(rows)} runs"]
    alone = sum(len(row.reference["heads"]) == 1 for row in learnt)
    step = statistics.median(row.values["learnt_at"] for row in learnt)
    summary = (
        f"learnt in {len(learnt)} of {len(rows)} runs (median: at step {step:,.0f}), by one head in {alone} of them"
    )
    return [*lines, summary]


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each run: the settings that differ, its values (null: never), the last row of its exercise."""
    keys = varied(outcomes)
    rows = []
    for outcome in outcomes:
        never = {"learnt_at": None} if outcome.reference else {"induction_at": None}
        settings = {key: outcome.settings.get(key) for key in keys}
        own = {"run": outcome.run, "finished": outcome.finished, "settings": settings}
        rows.append(own | never | dict(outcome.reference) | dict(outcome.values))
    return rows
