"""The command line of training: Hydra's flags and keys, presets of the user's own, exit statuses."""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import assert_one_line, train_here

from minitf.config.compose import compose_config
from minitf.config.overrides import own_text
from minitf.config.presets import CONF, GROUPS
from minitf.config.schema import load_config, written_values
from minitf.data.config import DataConfig
from minitf.data.sources.files import find_files


@pytest.fixture
def presets(workdir: Path) -> Path:
    """A folder of the user's own presets, my/, next to the current directory's other files."""
    files = {
        "experiment/mine.yaml": "# @package _global_\n# my own experiment\ndefaults:\n  - override /model: tall\n"
        "trainer:\n  max_steps: 7\n",
        "model/tall.yaml": "# deep and narrow\nnum_layers: 9\nhidden_size: 32\nnum_heads: 2\ncontext_length: 16\n",
        "place/home.yaml": "# @package _global_\nseed: 11\n",
        "tuned.yaml": "defaults:\n  - config\n  - _self_\nseed: 5\nhydra:\n  run:\n    dir: tuned_run\n",
    }
    for name, content in files.items():
        path = workdir / "my" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return workdir / "my"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed."""
    assert train_here(*arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --cfg


def test_cfg_job_prints_the_values_that_will_run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load(printed(capsys, "--cfg", "job"))
    assert shown == written_values(compose_config([]))
    assert (shown["trainer"]["max_minutes"], shown["trainer"]["max_steps"]) == (3.0, None)
    for key in ("threads", "micro_batch_size", "log_every", "eval_every", "save_every", "attention_every"):
        assert shown["trainer"][key] == "auto"
    assert {shown["model"][name] for name in ("num_layers", "hidden_size", "head_dim", "context_length")} == {"auto"}
    assert shown["tokenizer"]["vocab_size"] == "auto"
    assert shown["name"] == "kjv"
    assert list(workdir.iterdir()) == []


def test_cfg_job_resolves_what_needs_no_machine(capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load(printed(capsys, "--cfg", "job", "trainer.max_steps=5", "trainer.threads=0", "seed=3"))
    assert (shown["trainer"]["max_steps"], shown["trainer"]["max_minutes"]) == (5, None)
    assert shown["model"]["num_layers"] == 4
    assert shown["model"]["head_dim"] == 32
    assert shown["trainer"]["threads"] == "auto"
    assert shown["seed"] == 3


def test_cfg_prints_a_package_and_hydras_part(capsys: pytest.CaptureFixture[str]) -> None:
    model = yaml.safe_load(printed(capsys, "model=nano", "-c", "job", "-p", "model"))
    assert (model["num_layers"], model["intermediate_size"]) == (2, 384)
    assert "hydra" in yaml.safe_load(printed(capsys, "--cfg", "all"))
    assert list(yaml.safe_load(printed(capsys, "--cfg", "hydra"))) == ["hydra"]
    assert yaml.safe_load(printed(capsys, "--cfg", "hydra", "--package", "hydra.run")) == {"dir": "."}


def test_resolve_replaces_interpolations(capsys: pytest.CaptureFixture[str]) -> None:
    interpolated = ["--cfg", "job", "seed=${trainer.batch_size}"]
    assert yaml.safe_load(printed(capsys, *interpolated))["seed"] == "${trainer.batch_size}"
    assert yaml.safe_load(printed(capsys, *interpolated, "--resolve"))["seed"] == 16


# Other flags


def test_version_is_that_of_minitf(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"minitf {importlib.metadata.version('minitf')}\n"


@pytest.mark.slow
def test_info_prints_how_the_config_is_composed(workdir: Path) -> None:
    """In a process of its own: Hydra sets up logging."""
    code = """
from minitf.train import main
for what in ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"):
    assert main(["--info", what, "model=nano"]) == 0
assert main(["--info"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for expected in (str(CONF), "BasicSweeper", "num_layers: 2", "model: nano"):
        assert expected in done.stdout
    assert list(workdir.iterdir()) == []


def test_hydra_help_is_hydras(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Hydra" in printed(capsys, "--hydra-help")


def test_hydra_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    argv = sys.argv
    compose_config(["seed=2"])
    assert sys.argv is argv
    assert "HYDRA_FULL_ERROR" not in os.environ


# Presets of the user's own


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel installs it, with conf/ inside."""
    site = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CONF.parent / "minitf", site / "minitf", ignore=ignored)
    shutil.copytree(CONF, site / "minitf/conf", ignore=ignored)
    return site


@pytest.mark.slow
def test_an_installed_minitf_takes_presets_of_the_users_own(installed: Path, presets: Path) -> None:
    code = """
import sys
from minitf.errors import run_command
from minitf.train import main
assert main(["experiment=mine", "--config-dir", "my", "--cfg", "job"]) == 0
sys.exit(run_command(lambda: main(["experiment=mien", "-cd", "my"])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=presets.parent, capture_output=True, text=True,
        timeout=900, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    shown = yaml.safe_load(done.stdout)
    assert (shown["name"], shown["trainer"]["max_steps"], shown["model"]["num_layers"]) == ("mine", 7, 9)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert_one_line(done.stderr, "experiment=mien: no such option", "did you mean mine?")


def test_own_presets_are_in_the_help_and_in_errors(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "-cd", "my", "--help")
    assert "my own experiment" in page
    assert "deep and narrow" in page
    assert "half a minute" in page  # those of conf/ too
    assert "my own experiment" not in printed(capsys, "--help")
    assert train_here("-cd", "my", "model=qqqqq") == 2
    assert_one_line(capsys.readouterr().err, "model=qqqqq: no such option", "tall", "nano")
    assert train_here("model=tall") == 2
    assert_one_line(capsys.readouterr().err, "model=tall: no such option", "small")


def test_a_group_of_the_users_own_can_be_added(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yaml.safe_load(printed(capsys, "-cd", "my", "+place=home", "--cfg", "job"))["seed"] == 11
    assert train_here("+place=home", "--cfg", "job") == 2
    assert_one_line(capsys.readouterr().err, "place: no such key")


def test_another_primary_config_is_chosen_by_name(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load(printed(capsys, "-cd", "my", "-cn", "tuned", "--cfg", "job"))
    assert (shown["seed"], shown["run_dir"], shown["model"]["num_layers"]) == (5, "tuned_run", "auto")
    assert train_here("-cn", "tuned") == 2
    assert_one_line(capsys.readouterr().err, "there is no config 'tuned'")


def test_another_folder_takes_the_place_of_conf(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(CONF, presets / "whole")
    (presets / "whole/experiment/quick.yaml").write_text("# @package _global_\nseed: 13\n")
    shown = yaml.safe_load(printed(capsys, "-cp", "my/whole", "experiment=quick", "--cfg", "job"))
    assert (shown["seed"], shown["name"]) == (13, "quick")


# Where a run is


def test_hydra_run_dir_is_the_directory_of_the_run(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "trainer.max_steps=1", "hydra.run.dir=here/run") == 0
    assert [path.name for path in workdir.iterdir()] == ["here"]
    assert (workdir / "here/run/checkpoints/latest/model.safetensors").is_file()
    assert not (workdir / "here/run/.hydra").exists()
    assert load_config(workdir / "here/run/config.yaml").run_dir == "here/run"
    assert train_here(*tiny, "hydra.run.dir=unused", "trainer.dry_run=true") == 0
    assert not (workdir / "unused").exists()


def test_a_primary_config_may_set_the_directory_of_the_run(presets: Path, tiny: list[str]) -> None:
    assert train_here("-cd", "my", "-cn", "tuned", *tiny, "trainer.max_steps=1") == 0
    assert load_config(presets.parent / "tuned_run/config.yaml").seed == 5


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frobnicate"], ["--frobnicate: no such flag", "--help"]),
        (["--experimental-rerun", "run.pickle"], ["--experimental-rerun: no such flag"]),
        (["--resolve"], ["--resolve goes with --cfg"]),
        (["-p", "model"], ["-p goes with --cfg"]),
        (["--cfg", "job", "-p", "modle"], ["-p modle: no such section", "did you mean model?"]),
        (["--cfg", "job", "modle=nano"], ["modle: no such key", "did you mean model?"]),
        (["--cfg", "job", "model.num_heads=7"], ["model.num_heads=7"]),
        (["--cfg", "job", "resume=latest"], ["resume=latest does not go with --cfg job"]),
        (["--info", "all", "modle=nano"], ["modle: no such key"]),
        (["-cd", "absent"], ["absent: no such directory"]),
        (["-cp", "absent"], ["absent: no such directory"]),
        (["-cn", "absent"], ["there is no config 'absent'"]),
        (["resume=latest", "-cn", "other"], ["resume=latest has the config of that run", "--config-name other"]),
        (["resume=latest"], ["no run"]),
        (["-m", "resume=latest"], ["resume=latest does not go with --multirun"]),
        (["-m", "run_dir=here"], ["run_dir=here does not go with --multirun"]),
        (["-m", "hydra.run.dir=here"], ["run_dir=here does not go with --multirun"]),
        (["-m", "hydra.sweep.subdir=x"], ["hydra.sweep.subdir has no effect on a sweep"]),
        (["-m", "trainer.max_steps=5,0"], ["trainer.max_steps=0"]),
        (["-m", "model=nano,nanno"], ["model=nanno: no such option", "did you mean nano?"]),
        (["-m", "model=nano,null"], ["model=null: no such option"]),
        (["seed=1,2"], ["several values of a key are a sweep, which needs -m"]),
        (["-m", "seed=interval(1,2)"], ["seed=interval(1,2): a sweep takes values", "seed=0.1,0.2"]),
        (["-m", "seed=1,2", "hydra/launcher=jblib"], ["hydra/launcher=jblib: no such option"]),
        (["-m", "seed=1,2", "hydra/launcher=absent"], ["others come with packages", "'minitf[sweep]'"]),
        (["trainer.max_minutes=inf"], ["trainer.max_minutes=inf must be a number above 0 and below"]),
        (["attention.probes=['cost ${price}']"], ["write \\${ for the characters themselves"]),
        (["hydra.output_subdir=x"], ["hydra.output_subdir has no effect"]),
        (["data=text", "data.files=[absent.txt]"], ["absent.txt"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert train_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert_one_line(err, *words)
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--cfg", "jbo"], ["--cfg"], ["--cfg", "job", "-m"], ["-cd"]])
def test_a_flag_with_a_wrong_value_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train_here(*arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert_one_line(err, arguments[0].lstrip("-"))


def test_the_error_of_a_run_is_its_own_and_not_hydras(
    workdir: Path, capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    """A run that starts and then fails: exit status 1."""
    (workdir / "runs").write_text("a file in the place of the directory of runs")
    assert train_here(*tiny) == 1
    assert_one_line(capsys.readouterr().err, "runs")


def test_every_group_is_one_of_conf() -> None:
    assert sorted(GROUPS) == sorted(path.name for path in CONF.iterdir() if path.is_dir())


NAMES = [
    "book (1).txt", "Hello, World.txt", "Alice's.txt", "日本.txt", "[x].txt", "~draft.txt", '"q".txt', "a\\.txt",
    "a=b.txt", "null", "${x}.txt", "#a.txt", "1.5", " a .txt", "{a}.txt", "a:b.txt", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_suggested_command_can_be_pasted(workdir: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path(name).write_text("words " * 100)
    if "=" not in name:
        assert train_here(f"./{name}") == 2
        suggested = capsys.readouterr().err.split("for your own text: ")[1]
    else:
        suggested = own_text(f"./{name}")
    config = compose_config([*shlex.split(suggested)])
    assert [path.name for path in find_files(config.data.files).paths] == [name]
    located = config.data.located()
    assert find_files(located.files).paths == [workdir / name]


@pytest.mark.parametrize("name", ["book (1).txt", "Alice's.txt", "{a}.txt"])
def test_a_name_that_cannot_be_read_is_shown_in_quotes(
    workdir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert train_here("data=text", f"data.files=[a.txt, {name}]") == 2
    err = capsys.readouterr().err
    assert_one_line(err, "cannot be read; values with spaces and signs stand in quotes, as in ")
    (word,) = shlex.split(err.split("as in ")[1])
    assert compose_config(["data=text", word]).data.files == ["a.txt", name]


def test_letters_beyond_ascii_need_no_quotes(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "data=text", "data.files=[日本.txt, b é.txt,'x 日']", "name=日本", "--cfg", "job")
    assert yaml.safe_load(shown)["data"]["files"] == ["日本.txt", "b é.txt", "x 日"]
    assert yaml.safe_load(shown)["name"] == "日本"


def test_entries_of_files_are_found_from_any_directory(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = workdir / "[a]"
    (place / "sub").mkdir(parents=True)
    for name in ("one.txt", "two.txt", "sub/three.txt"):
        (place / name).write_text(name)
    monkeypatch.chdir(place)
    config = DataConfig(source="files", files=["*.txt", "./sub", "one.txt"], cache_dir="cache")
    found = find_files(config.files).paths
    located = config.located()
    monkeypatch.chdir(workdir)
    assert find_files(located.files).paths == [place / path for path in found]
    assert located.cache_dir == str(place / "cache")
