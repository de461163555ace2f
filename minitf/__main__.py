"""`minitf` and `python -m minitf`: what there is. `minitf COMMAND` is `python -m minitf.COMMAND`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from minitf.config.presets import COMMANDS, nearest
from minitf.errors import RequestError, run_command

OVERVIEW = """\
minitf: train a small transformer, see what its attention does, and test it.

  python -m minitf.train                train 3 minutes on the King James Bible
  python -m minitf.train data=text "data.files=[book.txt]"     your own text
  tensorboard --logdir runs             see loss, attention and samples
  python -m minitf.attention "TEXT"     see a text; --block "it>cat": a test
  python -m minitf.evaluate             held-out loss; --heads: what matters
  python -m minitf.generate "PROMPT"    continue a text
  python -m minitf.export               a GGUF file for llama.cpp
  Also minitf.benchmark and minitf.completion; each command takes --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the overview, or run the command that is named."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW)
        return 0
    if words[0] not in COMMANDS:
        raise RequestError(f"{words[0]}: no such command{nearest(words[0], list(COMMANDS))}")
    sys.argv = [f"minitf-{words[0]}", *words[1:]]  # as its own console command has it
    return int(import_module(f"minitf.{COMMANDS[words[0]]}").main() or 0)


def run() -> int:
    """The console command `minitf`."""
    return run_command(main)


if __name__ == "__main__":
    raise SystemExit(run())
