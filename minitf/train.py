"""The command `python -m minitf.train`: new runs, runs that go on, sweeps of several."""

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minitf.errors import RequestError, run_command

# torch and all that needs it are imported below, where they are used: --help answers without them.
if TYPE_CHECKING:
    from minitf.distributed.process_group import ProcessGroup

HYDRA_FLAGS = (
    "-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info",
    "--hydra-help", "--version",
)  # fmt: skip


def start(args: Sequence[str], group: "ProcessGroup") -> None:
    """Train as the command line says; where torchrun has started anew, go on with the run it was."""
    from minitf.config.schema import compose_config
    from minitf.runs.resume import resume
    from minitf.runs.start import new_run_dir, train, whole_context

    if known := group.remembered("run_dir"):  # its config.yaml holds all that the command line says
        return resume(known, [], group)
    resumed = [arg.removeprefix("resume=") for arg in args if arg.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        return resume(resumed[-1], [arg for arg in args if not arg.startswith("resume=")], group)
    config = whole_context(compose_config(args), args)
    if config.init_from:
        for arg in args:
            if re.match(r"(model|tokenizer)\b(?!\.(attention|dropout|context_length)=)", arg):
                raise RequestError(f"{arg}: init_from takes shape and tokenizer along, leave it out")
    return train(config, new_run_dir(config), group)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `help_page` for what it takes."""
    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args):
        from minitf.config.help import help_page

        print(help_page())
        return 0
    if args and args[0] in ("-sc", "--shell-completion"):  # Hydra's own does not know `python -m`
        from minitf.config.shell_completion import main as completion

        return completion([args[-1].removeprefix("install=")])
    # Threads that wait for each other keep their core instead of giving it back at every operation: a step took 164 ms
    # against 188 ms on two quiet cores, and beside other programs the same or less. OpenMP reads it when torch is
    # first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # on a new machine: two or three seconds, while torch is imported
        from minitf.backends.cpu.build import compile_ahead

        compile_ahead()
    from minitf.config.schema import check_sweep
    from minitf.distributed.process_group import connected

    with connected() as group:
        flags = [arg for arg in args if arg.startswith("-")]
        if not flags:
            start(args, group)
            return 0
        for arg in args:
            if arg in flags and arg.split("=")[0] not in HYDRA_FLAGS:
                setting = arg.lstrip("-") if "=" in arg else "model=small"
                raise RequestError(f"{arg}: no such flag; settings have no dashes, as in {setting}; see --help")
            if arg.startswith(("resume=", "run_dir=")):
                raise RequestError(f"{arg} does not go with {' '.join(flags)}")
        if group.size > 1:
            raise RequestError(
                f"{' '.join(flags)} does not go with torchrun: a sweep's runs are trained by one process each"
            )
        check_sweep([arg for arg in args if "=" in arg and not arg.startswith("-")])  # not the job of --cfg job
        from minitf.runs.sweep import sweep

        return sweep(args)


if __name__ == "__main__":
    from minitf.train import main as command  # by its own name, under which other processes find what a sweep runs

    raise SystemExit(run_command(command))
