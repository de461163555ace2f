"""The page that `python -m minitf.train --help` prints."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from minitf.config.presets import GROUPS, SECTIONS, options, settings

INTRODUCTION = """\
Train a small transformer and watch its attention: python -m minitf.train, and

    (nothing)                             the King James Bible, 3 minutes
    data=text "data.files=[book.txt]"     your own text: files, globs or folders
    experiment=quick                      half a minute: does everything work?
    trainer.max_minutes=15 model=small    longer, larger
    -m optim.learning_rate=1e-3,3e-3      a sweep: one run for each value
    trainer.dry_run=true                  estimate time, memory, disk; only that
    init_from=HuggingFaceTB/SmolLM2-135M  start from a model of the hub
    resume=latest                         resume the newest run
    resume=RUN trainer.max_steps=20000    ... and train it further than planned

Then: tensorboard --logdir runs, and python scripts/generate.py "PROMPT".
"""
FLAGS = (
    ("--cfg job|hydra|all", "print the composed config; `auto` is what the run decides; -p SECTION, --resolve"),
    ("-m, --multirun", "sweep: a key takes several values, key=a,b; hydra.sweep.dir=DIR says where"),
    ("-cd, --config-dir DIR", "presets of your own: DIR/experiment/mine.yaml is experiment=mine"),
    ("-cn, --config-name NAME", "another primary config than `config`, of conf/ or of DIR"),
    ("-cp, --config-path DIR", "another folder in place of conf/"),
    ("-i, --info [WHAT]", "how the config is composed: all, config, defaults, defaults-tree, plugins or searchpath"),
    ("--hydra-help, --version", ""),
)
CLOSING = """\
hydra.run.dir=DIR is run_dir=DIR. Completion, also of runs:
eval "$(python -m minitf.completion bash)", or zsh;
fish: python -m minitf.completion fish | source"""


def help_page(flags: Sequence[str] = ()) -> str:
    """The whole page, with the presets that the `flags` -cd and -cp lead to."""
    parts = [INTRODUCTION, "PRESETS  (group=option)\n"]
    for group in GROUPS:
        parts.append(f"  {group}=")
        parts += _table(list(options(group, flags).items()))
    parts.append("SETTINGS  (key=value; presets change the defaults; auto: the run decides)\n")
    for section in SECTIONS:
        parts += _table([(f"{s.key}={s.default}", s.comment) for s in settings(section)])
    return "\n".join([*parts, "FLAGS", *_table(FLAGS), CLOSING])


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """The rows, and an empty line. In a terminal a description stays in its column."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"    {name:<{width}}  {text}" for name, text in rows]
    if sys.stdout.isatty():
        columns, indent = shutil.get_terminal_size().columns, " " * (width + 6)
        lines = [part for line in lines for part in _broken(line, columns, indent)]
    return [*lines, ""]


def _broken(line: str, columns: int, indent: str) -> list[str]:
    """A row in lines of `columns`, if its second column has room for more than a few words."""
    if columns < len(indent) + 24:
        return [line]
    words = textwrap.wrap(line[len(indent) :], columns - len(indent), break_long_words=False, break_on_hyphens=False)
    return [line[: len(indent)] + (words or [""])[0], *(indent + part for part in words[1:])]
