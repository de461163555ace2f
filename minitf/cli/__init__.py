"""The command lines. Each console command of the wheel runs a module's `main` and ends as every command does."""

from functools import partial
from importlib import import_module

from minitf.config.presets import COMMANDS
from minitf.errors import run_command


def run(command: str) -> int:
    """Run a console command; only its own module is imported, so each starts as fast as by itself."""
    main = import_module(f"minitf.{COMMANDS[command]}").main
    return run_command(main)


run_train, run_generate, run_evaluate, run_attention, run_export, run_benchmark, run_completion = (
    partial(run, command) for command in COMMANDS
)
