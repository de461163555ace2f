"""Every command in the README and in .github/*.md runs as written, on tiny models and texts."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import make_text, train_here

from minitf.data.sources.references import cases_of
from minitf.interpretability.reference import SCORES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OURS = re.compile(r"\bpython3? (-m minitf\.|scripts/)")
# Third-party commands that the README may name; they install, wait, or run these tests, and are not run.
OTHERS = (
    "pip install ", "tensorboard --logdir ", "git clone ", "cd ", "python -m venv ", "python3 -m venv ", "source ",
    "torchrun ", "pytest", "hf upload ", "transformers serve ", "lm-eval ", "ruff ", "mypy", ".ci/run", "pre-commit ",
    "python -m build", "twine check ",
)  # fmt: skip
# Settings that the tiny run replaces; in documented commands they are validated and then left out.
REPLACED = ("data", "tokenizer", "model", "trainer.max_steps", "trainer.max_minutes", "trainer.compile", "experiment")
ANSWERS = re.compile(r"--beam|generate.*--file|Thou shalt")  # commands about a run on pairs
LOOK = {"split": "reference", "step": 1, "heads": [[0, 0]]} | dict.fromkeys(SCORES, 1.0)  # of a run in runs/sweep
PLACEHOLDER = re.compile(r"\bRUN\b|\bHuggingFaceTB/[\w.-]+|\bruns/(?!tiny/)[\w.…*-]+/[\w.…-]+")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def without_comment(line: str) -> str:
    quote = ""
    for i, char in enumerate(line):
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif not quote and char == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def commands(text: str) -> list[str]:
    """The commands of all bash blocks, without prompts and comments, each once."""
    found: dict[str, None] = {}
    for block in blocks(text, "(?:bash|sh|shell|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            line = without_comment(line).strip().removeprefix("$ ")
            found |= dict.fromkeys(part.strip() for part in re.split(r"\s&&\s", line) if part.strip())
    return list(found)


PAGES = {page.name: page.read_text(encoding="utf-8") for page in (README, *sorted((ROOT / ".github").glob("*.md")))}
COMMANDS = list(dict.fromkeys(command for text in PAGES.values() for command in commands(text)))
EXAMPLES = list(dict.fromkeys(example for text in PAGES.values() for example in blocks(text, "python")))
RUNNABLE = [
    pytest.param(command, marks=[] if command in commands(PAGES["README.md"]) else [pytest.mark.slow])
    for command in COMMANDS
    if OURS.search(command)
]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A run of two steps whose context fits the README's sentences."""
    run = tmp_path_factory.mktemp("readme") / "run"
    assert train_here(*tiny, "model.context_length=128", "trainer.max_steps=2", f"run_dir={run}") == 0
    return run


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """The same on pairs."""
    root = tmp_path_factory.mktemp("readme_pairs")
    lines = (f'{{"prompt": "The cat {number}", "completion": "sat"}}\n' for number in range(40))
    (root / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    own = [word for word in tiny if not word.startswith("data")]
    changes = ["model.context_length=128", "trainer.max_steps=2", f"run_dir={root / 'run'}"]
    assert train_here("data=pairs", f"data.files=[{root / 'pairs.jsonl'}]", *own, *changes) == 0
    return root / "run"


@pytest.fixture
def place(workdir: Path, pairs_run: Path, text_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the scripts, a run on pairs, and a newer run on text, which is `latest`.

    An exercise in reference has 48 of its sentences.
    """
    monkeypatch.setattr("minitf.evaluation.reference.cases_of", lambda *exercise: cases_of(*exercise)[:48])
    shutil.copytree(pairs_run, workdir / "runs/tiny/pairs", symlinks=True)
    shutil.copytree(text_run, workdir / "runs/tiny/one", symlinks=True)
    (workdir / "scripts").symlink_to(ROOT / "scripts")
    (workdir / "runs/sweep/seed").mkdir(parents=True)
    (workdir / "runs/sweep/seed/metrics.jsonl").write_text(json.dumps(LOOK) + "\n", encoding="utf-8")
    return workdir


def adapt(text: str, place: Path) -> str:
    """The command with a tiny run in place of the documented one, and with the text files it names created."""
    run = "runs/tiny/pairs" if ANSWERS.search(text) else "runs/tiny/one"
    adapted = PLACEHOLDER.sub(lambda found: found[0] if found[0] == "runs" else run, text)
    adapted = adapted.replace("init_from=runs/reader", "init_from=runs/tiny/one")
    adapted = adapted.replace("--answers cat dog", "--answers c d")  # the tiny model's tokens are bytes
    if adapted == text and OURS.search(text) and ANSWERS.search(text):
        adapted += f" --run {run}"
    text = adapted
    for name in re.findall(r"[\w./-]+\.(?:txt|md)\b", text):
        if not (place / name).exists() and not name.startswith(("/", "..")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(make_text(30), encoding="utf-8")
    return text


def run(command: str, place: Path) -> None:
    """Run a command in `place`: in this process, which has done the imports, unless it needs a shell."""
    words = shlex.split(command)
    if words[0] != "python" or {"|", "<", ">"} & set(words):
        in_a_shell(command, place)
        return
    status: object = 0
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open(encoding="utf-8") as nothing:
        patch.setattr(sys, "stdin", nothing)
        script = str(ROOT / "minitf" / f"{words[2].split('.')[1]}.py") if words[1] == "-m" else words[1]
        patch.setattr(sys, "argv", words[2 if words[1] == "-m" else 1 :])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert not status, command


def in_a_shell(command: str, place: Path) -> None:
    (place / "bin").mkdir()
    (place / "bin/python").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def train(arguments: list[str], tiny: list[str], place: Path) -> None:
    """A documented training: its settings are validated as written, then a tiny run uses those that it can have."""
    from minitf.config.compose import compose_config
    from minitf.config.overrides import check_overrides

    flags = [word for word in arguments if word.startswith("-")]
    if {"--help", "-h", "--cfg", "--hydra-help"} & set(flags):
        run(shlex.join(["python", "-m", "minitf.train", *arguments]), place)
        return
    # Of a run named in the documentation `adapt` made the tiny one, which is there already.
    settings = [word for word in arguments if word not in flags and word != "run_dir=runs/tiny/one"]
    check_overrides(settings, sweep="-m" in flags)
    if any(word.startswith("resume=") for word in settings):
        kept = [word for word in settings if not word.startswith(("trainer.max_steps", "trainer.max_minutes"))]
        assert train_here(*kept, "trainer.max_steps=4") == 0
        return
    if any(word.startswith("fork=") for word in settings):
        named = [re.sub(r"^fork=.*@\d+$", "fork=runs/tiny/one@2", word) for word in settings]
        assert train_here(*named, "trainer.max_steps=4") == 0
        return
    if "-m" not in flags:
        compose_config(settings)
    kept = [word for word in settings if not word.lstrip("+").startswith(REPLACED)]
    if not kept and settings:  # without others it would be the run of `python -m minitf.train`
        return
    if any(word.startswith("init_from=") for word in kept):  # the model brings its shape and tokenizer
        tiny = [word for word in tiny if not word.startswith(("model.", "tokenizer"))]
    defaults = [word for word in tiny if not any(word.split("=")[0] == other.split("=")[0] for other in kept)]
    changed = [*defaults, "trainer.max_steps=2", *kept]
    if "-m" not in flags:  # sweeps are run by test_sweep
        assert train_here(*changed) == 0


def test_the_readme_has_the_main_commands() -> None:
    for command in ("minitf.train", "scripts/generate.py", "tensorboard --logdir runs", "pip install"):
        assert command in "\n".join(commands(PAGES["README.md"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_known(command: str) -> None:
    assert OURS.search(command) or command.startswith(OTHERS), f"add {command!r} to the table of this test"
    for extra in re.findall(r"\.\[([\w,]+)\]", command):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extra.split(",")) <= set(project["optional-dependencies"])
    if command.startswith("tensorboard"):
        assert shlex.split(command)[2].rstrip("/") in ("runs", "RUN") or "runs/" in command


@pytest.mark.parametrize("command", RUNNABLE)
def test_every_command_of_ours_runs(command: str, place: Path, tiny: list[str]) -> None:
    command = adapt(command, place)
    if "minitf.train" in command:
        words = shlex.split(command)
        train(words[words.index("minitf.train") + 1 :], tiny, place)
        return
    command = command.replace(
        "scripts/benchmark.py", "scripts/benchmark.py --help"
    )  # it trains for minutes; kills: test_robustness
    command = command.replace("--kills 200", "--help").replace("--minutes 10", "--minutes 0.01 --inputs 2")
    command = re.sub(r"(scripts/generate\.py|-m minitf\.generate)", r"\1 --max-tokens 4", command)
    command = re.sub(r"--max-tokens (?!4\b)\d+", "--max-tokens 3", command)
    run(command, place)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_python_example_runs(number: int, place: Path) -> None:
    exec(compile(adapt(EXAMPLES[number], place), f"python example {number} of README.md and .github", "exec"), {})


def test_the_concept_pages_follow_the_model_of_pronouns_in_the_same_numbers() -> None:
    english, chinese = PAGES["three-steps.md"], PAGES["three-steps.zh.md"]
    assert commands(english) == [command for command in commands(chinese) if "data.language=zh" not in command]
    assert blocks(english, "python") == blocks(chinese, "python")
    for page in (english, chinese):
        shares = re.search(r"\| (?:share|份额) \|(.*)\|", page)
        assert shares
        assert sum(float(share) for share in re.findall(r"[\d.]+", shares[1])) == pytest.approx(100)
        assert "experiment=pronouns model.num_layers=2 model.num_heads=4" in page


def test_settings_named_in_the_pages_exist() -> None:
    from minitf.config.presets import SECTIONS, all_keys

    sections = "|".join(section for section in SECTIONS if section)
    names = re.compile(rf"`((?:{sections})\.(?!json\b|html\b|py\b)[a-z_]+)")
    named = {name for text in PAGES.values() for name in names.findall(text)}
    assert named <= set(all_keys()), f"a page names settings that do not exist: {named - set(all_keys())}"


def test_commands_are_extracted_from_markdown() -> None:
    text = """
```bash
pip install -e . && python -m minitf.train
$ python scripts/generate.py "say # two, a=b" --run runs/kjv/2026-01-01_12-00-00   # a comment
python -m minitf.train \\
    model=small
```
text, `python nothing`
```python
import minitf
```
"""
    assert commands(text) == [
        "pip install -e .",
        "python -m minitf.train",
        'python scripts/generate.py "say # two, a=b" --run runs/kjv/2026-01-01_12-00-00',
        "python -m minitf.train      model=small",
    ]
    assert blocks(text, "python") == ["import minitf\n"]
    assert PLACEHOLDER.sub("X", "--logdir runs resume=RUN --run runs/kjv/2026-01-01_12-00-00 runs/tiny/one") == (
        "--logdir runs resume=X --run X runs/tiny/one"
    )
