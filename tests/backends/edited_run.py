"""Trains, looks inside and generates with the minitf that is on the path, and prints what came of it as JSON.

Run by test_edits.py in processes of its own: `python edited_run.py train|inspect '{"settings": ...}'`.
"""

import contextlib
import io
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from minitf.errors import run_command

SENTENCE = "The cat sat on the mat."
NUM_TOKENS = 12


def train(name: str, settings: list[str]) -> dict[str, Any]:
    """A run of a few steps: losses, the held-out loss, and the line that names the backend."""
    from minitf.train import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = run_command(lambda: main([*settings, f"run_dir={name}"]))
    rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    backend = [line for line in said.getvalue().splitlines() if line.startswith("backend")]
    return {"status": status, "losses": [(row["split"], row["loss"]) for row in rows], "backend": " ".join(backend)}


def inspect(run: str) -> dict[str, Any]:
    """Of a trained run: maps, whether the standard formula explains them, and greedy text by every engine."""
    import minitf
    from minitf.generate import GenerationRequest, generate
    from minitf.inference.sampling import Sampling

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        lm = minitf.load(run)
        maps = lm.attention(SENTENCE)
        ids = lm.tokenizer.encode(SENTENCE)
        texts = {}
        for engine in ("torch", "native", "auto"):
            request = GenerationRequest(ids, Sampling(temperature=0), max_tokens=NUM_TOKENS, engine=engine)
            texts[engine] = [int(step.ids_B[0]) for step in islice(generate(lm.model, request), NUM_TOKENS)]
    return {
        "weights": maps.weights_LHTS.flatten().tolist(),
        "standard": maps.to_viewer()["standard_formula"],
        "texts": texts,
        "said": said.getvalue(),
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    result = {
        **{name: train(name, settings) for name, settings in request.get("train", {}).items()},
        **{f"inspect {run}": inspect(run) for run in request.get("inspect", [])},
    }
    print(json.dumps(result))
