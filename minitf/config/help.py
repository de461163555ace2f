"""The page that `python -m minitf.train --help` prints."""

from collections.abc import Sequence

from minitf.config.presets import GROUPS, SECTIONS, options, settings

INTRODUCTION = """\
Train a small transformer and watch its attention.

    python -m minitf.train                                        a small model of the King James Bible, 3 minutes
    python -m minitf.train data=text "data.files=[book.txt]"      your own text: files, globs or folders
    python -m minitf.train experiment=quick                       half a minute, to see that everything works
    python -m minitf.train trainer.max_minutes=15 model=small     longer, larger
    python -m minitf.train -m optim.learning_rate=1e-3,3e-3       a sweep: one run for each value
    python -m minitf.train trainer.dry_run=true                   estimate time, memory and disk; train nothing
    python -m minitf.train init_from=HuggingFaceTB/SmolLM2-135M   start from a pretrained model of the hub
    python -m minitf.train resume=latest                          resume the newest run
    python -m minitf.train resume=RUN trainer.max_steps=20000     ... and train it further than planned

Then: tensorboard --logdir runs, and python scripts/generate.py "PROMPT".
"""
FLAGS = """\
FLAGS
    --cfg job|hydra|all        print the composed config and exit; `auto` is what the run decides; -p SECTION, --resolve
    -m, --multirun             sweep: a key takes several values, key=a,b; hydra.sweep.dir=DIR says where
    -cd, --config-dir DIR      presets of your own: DIR/experiment/mine.yaml is experiment=mine
    -cn, --config-name NAME    another primary config than `config`, of conf/ or of DIR
    -cp, --config-path DIR     another folder in place of conf/
    -i, --info [WHAT]          how the config is composed: all|config|defaults|defaults-tree|plugins|searchpath
    --hydra-help, --version

hydra.run.dir=DIR is run_dir=DIR. Completion, also of runs: eval "$(python -m minitf.completion bash)", or zsh;
fish: python -m minitf.completion fish | source"""


def help_page(flags: Sequence[str] = ()) -> str:
    """The whole page, with the presets that the `flags` -cd and -cp lead to."""
    parts = [INTRODUCTION, "PRESETS  (group=option)\n"]
    for group in GROUPS:
        parts.append(f"  {group}=")
        parts += _table(list(options(group, flags).items()))
    parts.append("SETTINGS  (key=value; a preset changes the defaults shown; auto: the run decides)\n")
    for section in SECTIONS:
        parts += _table([(f"{s.key}={s.default}", s.comment) for s in settings(section)])
    return "\n".join([*parts, FLAGS])


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [*(f"    {name:<{width}}  {text}" for name, text in rows), ""]
