"""Third-party programs on our checkpoints, as the documentation shows them: lm-eval, transformers serve, openai."""

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

pytestmark = pytest.mark.neighbours
ROOT = Path(__file__).parents[2]
INSTALL = "install the extra minitf[neighbours]"


def test_lm_eval_measures_our_bits_per_byte(trained_run: Path, workdir: Path) -> None:
    """The documented task, on a text shorter than the context, where both score the same tokens."""
    evaluator: Any = pytest.importorskip("lm_eval.evaluator", reason=INSTALL)
    pages = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    (task,) = re.findall(r"```yaml\n(task: .*?)```", text, flags=re.DOTALL)
    (workdir / "task.yaml").write_text(task)
    text = make_text(1)
    (workdir / "book.txt").write_text(text)
    checkpoint = str(trained_run / "checkpoints/best")
    found = evaluator.simple_evaluate("hf", f"pretrained={checkpoint},dtype=float32", ["task.yaml"], device="cpu")
    measured = next(value for key, value in found["results"]["my_text"].items() if key.startswith("bits_per_byte"))
    # lm-eval also scores the first token, after an end-of-text token; to us it is only context.
    assert measured == pytest.approx(minitf.load(checkpoint, "cpu").evaluate(text).bits_per_byte, rel=0.1)


def _is_up(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health")
    except OSError:
        return False
    return True


def test_transformers_serves_our_models_to_an_openai_client(trained_run: Path, copying_run: Path) -> None:
    openai = pytest.importorskip("openai", reason=INSTALL)
    pytest.importorskip("uvicorn", reason=INSTALL)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", port]
    server = subprocess.Popen([*serve, "--device", "cpu", "--dtype", "float32"], env={**os.environ, "NO_PROXY": "*"})
    try:
        while not _is_up(f"http://localhost:{port}"):
            assert server.poll() is None, "the server ended by itself"
            time.sleep(0.3)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=600)
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
