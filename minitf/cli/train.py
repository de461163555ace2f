"""The command line of training: Hydra's, whose jobs train; `resume=` and `fork=`, which Hydra never sees."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minitf.config.presets import all_keys, nearest
from minitf.errors import CommandParser, RequestError

# Whatever needs torch or Hydra is imported where it is used: --help answers without them.
if TYPE_CHECKING:
    from omegaconf import DictConfig

    from minitf.distributed.process_group import ProcessGroup

SEARCH = ("config_dir", "config_path", "config_name")  # flags that say where presets are
ACTION = ("multirun", "cfg", "package", "resolve", "info", "hydra_help")  # flags for anything but a single run


def parser() -> CommandParser:
    """Hydra's flags, as far as they have an effect; config/help.py describes them."""
    p = CommandParser(prog="python -m minitf.train", add_help=False, allow_abbrev=False)
    p.add_argument("overrides", nargs="*")
    p.add_argument("--version", action="store_true")
    p.add_argument("-sc", "--shell-completion", action="store_true")
    p.add_argument("-cd", "--config-dir")
    p.add_argument("-cn", "--config-name")
    # Hydra would take a relative path from the folder of this file.
    p.add_argument("-cp", "--config-path", type=os.path.abspath)
    action = p.add_mutually_exclusive_group()
    action.add_argument("-r", "--run", action="store_true")
    action.add_argument("-m", "--multirun", action="store_true")
    action.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    action.add_argument(
        "-i", "--info", nargs="?", const="all",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    )  # fmt: skip
    action.add_argument("--hydra-help", action="store_true")
    p.add_argument("-p", "--package")
    p.add_argument("--resolve", action="store_true")
    return p


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Flags and overrides, in any order; RequestError for a flag that does not exist or has no effect."""
    args, unknown = parser().parse_known_intermixed_args(words)
    for word in unknown:
        setting = word.lstrip("-") if "=" in word else "model=small"
        raise RequestError(f"{word}: no such flag; settings have no dashes, as in {setting}; see --help")
    if (args.resolve or args.package) and not args.cfg:
        raise RequestError(f"{'--resolve' if args.resolve else '-p'} goes with --cfg")
    if args.package and args.package.split(".")[0] not in ("hydra", "_global_", *(keys := all_keys())):
        raise RequestError(f"-p {args.package}: no such section{nearest(args.package, keys)}")
    for folder in (args.config_dir, args.config_path):
        if folder and not Path(folder).is_dir():
            raise RequestError(f"{folder}: no such directory of presets")
    return args


def as_words(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The flags of `names` that are set, as Hydra takes them."""
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return [word for flag, value in given.items() if value for word in ([flag] if value is True else [flag, value])]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `help_page` for what it takes."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        from minitf.config.help import help_page

        print(help_page(words))
        return 0
    args = parse(words)
    search = as_words(args, SEARCH)
    action = as_words(args, ACTION)
    if args.version:
        from importlib.metadata import version

        print(f"minitf {version('minitf')}")
        return 0
    if args.shell_completion:  # Hydra's own does not know `python -m`
        from minitf.config.shell_completion import main as completion

        return completion([word.removeprefix("install=") for word in args.overrides])
    # Hydra would create its run.dir before anything is checked, and accepts non-ASCII letters only in quotes.
    overrides = [re.sub(r"^\+*hydra\.run\.dir=", "run_dir=", _readable(word)) for word in args.overrides]
    if not action or args.multirun:
        _prepare_environment()
    if not action:
        _announce(overrides, search)
    from minitf.distributed.process_group import process_group

    with process_group() as group:
        if not action:
            start(overrides, search, group)
            return 0
        if group.size > 1:
            raise RequestError(f"{' '.join(action)} does not go with torchrun: each run of a sweep is one process")
        for word in overrides:
            if word.startswith(("resume=", "fork=")) or (args.multirun and word.startswith("run_dir=")):
                raise RequestError(f"{word} does not go with {' '.join(action)}")
        if args.multirun:
            from minitf.runs.sweep import sweep

            return sweep(overrides, search)
        return show(overrides, search, action)


def _readable(word: str) -> str:
    """A setting as Hydra can read it; `resume=` and `fork=` never come to it."""
    from minitf.config.overrides import quote_letters

    return word if word.startswith(("resume=", "fork=")) else quote_letters(word)


def _prepare_environment() -> None:
    """What has to happen before torch is imported."""
    # Threads that wait actively keep their core instead of yielding it at every operation: a step took 164 ms against
    # 188 ms on two quiet cores, and on busy ones the same or less. OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # two or three seconds on a new machine, during the import of torch
        from minitf.backends.cpu.build import compile_ahead

        compile_ahead()


def _announce(overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Print within a second what the run is going to do, where someone waits for it: in a terminal or a notebook."""
    from minitf.reporting.console import TrainingConsole, line

    console = TrainingConsole()
    if not console.breaks_lines or os.environ.get("RANK", "0") != "0":
        return
    if resumed := [word.partition("=")[2] for word in overrides if word.startswith("resume=")]:
        console.say(line("minitf", f"resuming {resumed[-1]}"))
        return
    from minitf.config.overrides import check_overrides
    from minitf.config.preview import preview

    for number, text in enumerate(preview(check_overrides(overrides, flags), flags)):
        console.say(line("" if number else "minitf", text))


def start(overrides: Sequence[str], flags: Sequence[str], group: "ProcessGroup") -> None:
    """Train a new run, fork or resume one; after a restart by torchrun resume the run of the processes before."""
    from minitf.config.compose import run_task, to_config
    from minitf.config.overrides import check_overrides
    from minitf.runs.fork import fork
    from minitf.runs.resume import resume
    from minitf.runs.start import new_run_dir, train

    if known := group.get_from_before_restart("run_dir"):  # its config.yaml holds all of the command line
        return resume(known, [], group)
    resumed = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        if flags:
            raise RequestError(f"resume={resumed[-1]} has the config of that run: leave out {' '.join(flags)}")
        return resume(resumed[-1], [word for word in overrides if not word.startswith("resume=")], group)
    forked = [word.removeprefix("fork=") for word in overrides if word.startswith("fork=")]
    if forked and forked[-1] not in ("", "null"):
        if flags:
            raise RequestError(f"fork={forked[-1]} has the config of that run: leave out {' '.join(flags)}")
        return fork(forked[-1], [word for word in overrides if not word.startswith("fork=")], group)
    check_overrides(overrides, flags)

    def job(composed: "DictConfig") -> None:
        config = to_config(composed)
        train(config, new_run_dir(config), group)

    return run_task(job, overrides, flags)


def show(overrides: Sequence[str], search: Sequence[str], action: Sequence[str]) -> int:
    """--cfg, --info, --hydra-help: Hydra prints, and nothing is trained."""
    from minitf.config.compose import decided_overrides, run_hydra
    from minitf.config.overrides import check_overrides

    check_overrides(overrides, search)
    decided = decided_overrides(overrides, search) if "--cfg" in action else []
    try:
        run_hydra(lambda composed: None, [*overrides, *decided], [*search, *action])
    except SystemExit as end:  # --hydra-help, or -p PACKAGE that is not in the config
        return RequestError.exit_status if end.code else 0
    return 0
