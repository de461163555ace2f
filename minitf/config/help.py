"""The page `python -m minitf.train --help` prints, read from conf/ and from the dataclasses' sources.

Nothing is imported for it: it appears in a fraction of a second, and a setting's comment is its documentation.
"""

import ast
import difflib
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF = next((path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()), PACKAGE / "conf")
GROUPS = ("experiment", "data", "tokenizer", "model", "optim")
# Section of the config -> the module and the dataclass that own it.
SECTIONS = {
    "": ("config/schema", "Config"),
    "data": ("data/config", "DataConfig"),
    "tokenizer": ("tokenizer", "TokenizerConfig"),
    "model": ("model", "ModelConfig"),
    "optim": ("optim", "OptimConfig"),
    "trainer": ("training/trainer_config", "TrainerConfig"),
    "attention": ("interpretability/attention_maps", "AttentionConfig"),
}

INTRODUCTION = """\
Train a small transformer and watch its attention.

    python -m minitf.train                                        a small model of the King James Bible, 3 minutes
    python -m minitf.train data=text "data.files=[book.txt]"      your own text: files, globs or folders
    python -m minitf.train experiment=quick                       half a minute, to see that all works
    python -m minitf.train trainer.max_minutes=15 model=small     longer, larger
    python -m minitf.train -m optim.learning_rate=1e-3,3e-3       a sweep: one run for each value
    python -m minitf.train trainer.dry_run=true                   what it would take; nothing is trained or written
    python -m minitf.train init_from=HuggingFaceTB/SmolLM2-135M   go on from a pretrained model of the hub
    python -m minitf.train resume=latest                          go on with the newest run
    python -m minitf.train resume=RUN trainer.max_steps=20000     ... further than it was meant to go

Then: tensorboard --logdir runs, and python scripts/generate.py "PROMPT".
"""


class Setting(NamedTuple):
    key: str
    type: str
    default: str
    comment: str


def settings(section: str) -> Iterator[Setting]:
    """The settings of one section of the config, in the order of its dataclass."""
    module, name = SECTIONS[section]
    path = PACKAGE / f"{module}.py"
    with tokenize.open(path) as file:
        source = file.read()
    lines = source.splitlines()
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in next(classes).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if section == "" and node.target.id in SECTIONS:
            continue
        line = lines[(node.end_lineno or node.lineno) - 1]
        comment = line[node.end_col_offset or 0 :].partition("#")[2].strip()
        value = ast.unparse(node.value) if node.value else ""
        written = {"None": "null", "True": "true", "False": "false"}
        written |= {"field(default_factory=list)": "[]", "field(default_factory=dict)": "{}"}
        default = written.get(value, value)
        if default.startswith("field(default_factory=lambda: "):
            default = default.removeprefix("field(default_factory=lambda: ").removesuffix(")")
        key = f"{section}.{node.target.id}" if section else node.target.id
        yield Setting(key, ast.unparse(node.annotation), default.strip("'") or '""', comment)


def options(group: str) -> dict[str, str]:
    """The presets of a config group with the comment that begins each file."""
    found = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line]
        found[path.stem] = comments[0] if comments else ""
    return found


def help_page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "PRESETS  (group=option)\n"]
    for group in GROUPS:
        found = options(group)
        width = max(map(len, found), default=0)
        parts.append(f"  {group}=")
        parts += [f"    {name:<{width}}  {comment}" for name, comment in found.items()]
        parts.append("")
    parts.append("SETTINGS  (key=value; a preset changes the defaults shown)\n")
    for section in SECTIONS:
        found_settings = list(settings(section))
        width = max(len(f"{s.key}={s.default}") for s in found_settings)
        parts += [f"    {f'{s.key}={s.default}':<{width}}  {s.comment}" for s in found_settings]
        parts.append("")
    parts.append("Also: --cfg job prints the composed config; -m sweeps; --hydra-help for what Hydra adds.")
    parts.append(
        'Completion, also of runs: eval "$(python -m minitf.completion bash)", or zsh; fish: ... fish | source'
    )
    return "\n".join(parts)


def all_keys() -> list[str]:
    """Every key that can be set, sections included."""
    return [s.key for section in SECTIONS for s in settings(section)] + [section for section in SECTIONS if section]


def _initials(key: str) -> str:
    return "".join(part[:1] for part in key.rsplit(".", 1)[-1].split("_"))


def nearest(word: str, valid: list[str]) -> str:
    """ "; did you mean ...?" for the closest valid word, or nothing."""
    last = word.rsplit(".", 1)[-1]
    close = [key for key in valid if len(last) > 1 and _initials(key) == last]  # lr
    close = close or difflib.get_close_matches(word, valid, n=1, cutoff=0.4)
    if not close:  # the right name in the wrong section
        close = [key for key in valid if key.rsplit(".", 1)[-1] == last]
        close = close or difflib.get_close_matches(last, valid, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else "; --help lists what there is"
