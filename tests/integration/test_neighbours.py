"""Programs of others on our checkpoints, as the README shows them; each test needs them installed."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers import make_text

import minitf

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.machines
def test_lm_eval_measures_the_same(trained_run: Path, workdir: Path) -> None:
    """The README's task on a file shorter than the context: no window, no difference."""
    evaluator: Any = pytest.importorskip("lm_eval.evaluator", reason="pip install 'lm-eval[hf]'")
    (task,) = re.findall(r"```yaml\n(task: .*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (workdir / "task.yaml").write_text(task)
    text = make_text(1)
    (workdir / "book.txt").write_text(text)
    checkpoint = str(trained_run / "checkpoints/best")
    found = evaluator.simple_evaluate("hf", f"pretrained={checkpoint},dtype=float32", ["task.yaml"], device="cpu")
    measured = next(value for key, value in found["results"]["my_text"].items() if key.startswith("bits_per_byte"))
    # lm-eval lets the first token follow the end of a text; here it is context alone.
    assert measured == pytest.approx(minitf.load(checkpoint, "cpu").evaluate(text).bits_per_byte, rel=0.1)


@pytest.mark.machines
def test_transformers_serves_the_openai_client(trained_run: Path, copying_run: Path, workdir: Path) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", port]
    server = subprocess.Popen([*serve, "--device", "cpu", "--dtype", "float32"], env={**os.environ, "NO_PROXY": "*"})
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                time.sleep(0.3)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        text, pairs = (str(run / "checkpoints/best") for run in (trained_run, copying_run))
        asked = {"max_tokens": 12, "temperature": 0}
        ours = minitf.load(text, "cpu").generate("The cat", max_tokens=12, temperature=0)
        assert client.completions.create(model=text, prompt="The cat", **asked).choices[0].text == ours
        chat = [{"role": "user", "content": "The "}, {"role": "user", "content": "cat"}]
        answer = client.chat.completions.create(model=text, messages=chat, **asked).choices[0].message.content
        assert answer.strip() == str(ours).strip()
        chat = [{"role": "user", "content": "abcd"}]
        answer = client.chat.completions.create(model=pairs, messages=chat, **asked).choices[0].message.content
        assert answer == minitf.load(pairs, "cpu").answer("abcd") == "abcd"
    finally:
        server.terminate()
        server.wait(20)
