"""Shared fixtures: a log directory, and a TensorBoard process that serves it with the Attention tab."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from helpers import maps_of

from minitf.interpretability.picture import attention_picture
from minitf.reporting.reporter import RunReporter

RUN = "tiny/one"


@pytest.fixture(scope="module")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with the entry point of an installed minitf, by which TensorBoard finds the plugin."""
    root = Path(__file__).parents[1]
    installed = tmp_path_factory.mktemp("site") / "minitf-0.0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: minitf\nVersion: 0.0.0\n")
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    entry = project.split("[project.entry-points.tensorboard_plugins]")[1].split("\n")[1].replace('"', "")
    (installed / "entry_points.txt").write_text(f"[tensorboard_plugins]\n{entry}\n")
    return os.pathsep.join([str(installed.parent), str(root)])


def write_looks(run_dir: Path, steps: range, resumed_from: int = 0) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    maps = maps_of(["the", " cat", " sat"], 1, 2)
    png = attention_picture(maps)
    with RunReporter(run_dir, resumed_from) as reporter:
        for step in steps:
            reporter.scalars({"heads/induction/layer0_head1": step / 100, "train/loss": 9.0 - step / 100}, step)
            reporter.attention({**maps.to_viewer(), "step": step, "wrote": resumed_from}, png, step)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """Five runs: of 100 steps, resumed at step 5 after step 8, trained, damaged, and without its checkpoints."""
    logdir = tmp_path_factory.mktemp("logdir")
    write_looks(logdir / "hundred", range(100))
    write_looks(logdir / "resumed", range(9))
    write_looks(logdir / "resumed", range(6, 12), resumed_from=5)
    (logdir / "resumed/attention.jsonl").unlink()  # the plugin then falls back on TensorBoard's data
    shutil.copytree(trained_run, logdir / RUN, symlinks=True)
    shutil.copytree(logdir / "hundred", logdir / "damaged")
    file = next((logdir / "damaged").glob("events.out.*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = b"x" * 50
    file.write_bytes(content[: len(content) * 7 // 10])
    shutil.copytree(trained_run, logdir / "gone", symlinks=True)
    shutil.rmtree(logdir / "gone/checkpoints")
    shutil.rmtree(logdir / "gone/snapshots", ignore_errors=True)
    rows = (logdir / "gone/attention.jsonl").read_bytes()
    (logdir / "gone/attention.jsonl").write_bytes(b'{"text": "\\ud8", "step": 1, }\n' + rows[: len(rows) // 2])
    return logdir


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def server(request: pytest.FixtureRequest, logdir: Path, plugin_path: str) -> Iterator[str]:
    """The address of the plugin in a TensorBoard over `logdir`, with the Rust or the Python loader."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    command += [f"--load_fast={request.param}", "--path_prefix", "/some/where", "--reload_interval", "1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": plugin_path}, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/some/where/data/plugin/minitf_attention"
    try:
        while not _has_read_all(address):
            assert process.poll() is None, "TensorBoard ended by itself"
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(900)


def _has_read_all(address: str) -> bool:
    try:
        if len(get(f"{address}/runs")["runs"]) < 5:
            return False
        for run, last in ((RUN, 40), ("gone", 40), ("hundred", 99), ("resumed", 11)):
            found = get(f"{address}/run", run=run)
            get(f"{address}/map", run=run, tag=found["sentences"][0]["tag"], step=last)
            if found["curves"]["train"][-1][0] != last or found["scores"]["steps"][-1] != last:
                return False
    except (OSError, LookupError):  # not listening yet, or only a part of the files is read
        return False
    return True


def get(address: str, **arguments: object) -> Any:
    with urllib.request.urlopen(f"{address}?{urlencode(arguments)}") as reply:
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        body = reply.read()
        return json.loads(gzip.decompress(body) if reply.headers["Content-Encoding"] == "gzip" else body)


def looks(address: str, run: str) -> list[list[float]]:
    return list(get(f"{address}/run", run=run)["sentences"][0]["looks"])
