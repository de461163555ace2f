"""RUN, as users name runs and checkpoints: a directory, `latest`, or a model on the Hugging Face hub."""

import re
from pathlib import Path

from minitf.checkpoints.hugging_face import fetch_model, is_hub_name
from minitf.errors import RequestError

RUNS = Path("runs")
STEP_NAME = re.compile(r"step_(\d{8,15})")
LINKS = ("latest", "best")
DEPTHS = ("*", "*/*", "*/*/*")  # of runs below runs/: run_dir=runs/ONE, runs/NAME/DATE_TIME, runs/sweep/DATE_TIME/RUN
SNAPSHOTS = "snapshots"  # the folder of a run's snapshots, next to checkpoints/


def newest_run(runs: Path = RUNS) -> Path:
    """The run directory under `runs` with the newest checkpoint."""
    found = [path for pattern in DEPTHS for path in _checkpoints_below(runs, pattern)]
    if not found:
        raise RequestError(f"no run with a checkpoint under {runs.absolute()}: train one with python -m minitf.train")
    return max(found, key=_modified).parent.parent


def _checkpoints_below(folder: Path, runs: str) -> list[Path]:
    """A checkpoint of each of the `runs`, a glob, in a folder: `latest`, or any, as a copy may have lost its links."""
    return [path for name in ("latest", "step_*") for path in folder.glob(f"{runs}/checkpoints/{name}")]


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def last_started(runs: Path = RUNS) -> Path:
    """The run directory under `runs` that was active last, even if it has no checkpoint yet."""
    found = [path.parent for pattern in DEPTHS for path in runs.glob(f"{pattern}/config.yaml")]
    if not found:
        raise RequestError(f"no run under {runs.absolute()}: train one with python -m minitf.train")
    return max(found, key=_last_active)


def _last_active(run: Path) -> float:
    paths = [run / "config.yaml", run / "metrics.jsonl", run / "checkpoints/latest"]
    return max(_modified(path) for path in paths if path.exists())


def find_run(run: str | Path) -> Path:
    """The run directory that RUN (a run directory, one of its checkpoints, or `latest`) names."""
    if str(run) == "latest":
        return last_started()
    path = Path(run)
    for directory in (path, *path.absolute().parents[:2]):
        if (directory / "config.yaml").is_file():
            return directory
    if configs := list(path.glob("*/config.yaml")):  # runs/NAME: the newest run of that name
        return max((config.parent for config in configs), key=_last_active)
    raise RequestError(f"{run} is not a run: no config.yaml in it; a run is a directory such as {RUNS}/NAME/DATE_TIME")


def find_checkpoint(run: str | Path, prefer: str = "best") -> Path:
    """The checkpoint directory that RUN names; for a run, its checkpoint `prefer` (best or latest)."""
    return find_checkpoints(run, prefer)[0]


def find_checkpoints(run: str | Path, prefer: str = "best") -> list[Path]:
    """The checkpoint directories that RUN names, the preferred one first; for a run, its others follow as fallbacks."""
    if str(run) == "latest":
        run = newest_run()
    path = Path(run)
    if (path / "config.json").is_file():
        return [path.resolve()]
    if found := _all_checkpoints(path / "checkpoints", prefer):
        return found
    if path.is_dir() and (inside := _checkpoints_below(path, "*")):  # runs/NAME: its newest run
        return find_checkpoints(max(inside, key=_modified).parent.parent, prefer)
    if is_hub_name(str(run)):
        return [fetch_model(str(run))]
    if not path.exists():
        raise RequestError(f"{run} does not exist: give a run directory, a checkpoint directory, or latest")
    if (path / "config.yaml").is_file():
        raise RequestError(f"the run {run} has no checkpoint yet")
    raise RequestError(f"{run} is neither a run nor a checkpoint: it has no config.json and no checkpoints/")


def _all_checkpoints(checkpoints: Path, prefer: str) -> list[Path]:
    """A run's checkpoints in the order in which to try them.

    `best` falls back to `latest` and then to the newest step. `latest`, which is for resuming, falls back to the steps
    before it, newest first, then to those after it. Links out of the directory are ignored.
    """
    if not checkpoints.is_dir():
        return []
    inside = checkpoints.resolve()
    steps = [path for path in inside.iterdir() if step_of(path) >= 0 and path.is_dir() and not path.is_symlink()]
    steps.sort(key=step_of, reverse=True)
    linked = {}
    for name in LINKS:
        target = (inside / name).resolve()
        if target.is_dir() and target.parent == inside:
            linked[name] = target
    first = [linked[name] for name in (prefer, *LINKS) if name in linked]
    if prefer == "latest" and first:  # `best` may be many steps older than the step before `latest`
        first = first[:1]
        steps.sort(key=lambda path: step_of(path) > step_of(first[0]))
    return list(dict.fromkeys([*first, *steps]))


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name; -1 for any other name."""
    match = STEP_NAME.fullmatch(directory.name)
    return int(match[1]) if match else -1
