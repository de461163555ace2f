"""The targets of the fuzzer: loaders of checkpoints and data, the tokenizer, the configuration, generation.

Each target takes bytes, damages a valid file or request with them as a stranger would, and uses the result.
"""

import contextlib
import gzip
import io
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

INTERESTING: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 1 << 31, 1 << 62, 10**30, -(10**30), 1e308, float("inf"), float("nan"), True, None, "", "x", [],
    {}, [1], {"a": 1}, "${oc.env:HOME}", "../../etc/passwd", "\ud800", "\0", "999999999999",
)  # fmt: skip
IMPORTED = (
    "minitf.checkpoints.checkpoint", "minitf.checkpoints.train_state", "minitf.config.schema", "minitf.data.config",
    "minitf.generate", "minitf.inference.sampling", "minitf.model", "minitf.tokenizer", "minitf.training.task",
)  # fmt: skip
NAMES = ("checkpoint", "data", "tokenizer", "tokenizer_file", "config", "generation")


class Targets:
    """One method for each target; all work in one directory."""

    def __init__(self, directory: Path) -> None:
        from minitf.data.tokenizer_training import train_tokenizer
        from minitf.model import ModelConfig, Transformer
        from minitf.tokenizer import TokenizerConfig

        self.directory = directory
        text = "The cat sat on the mat, and it was tired. 世界 \n" * 20
        self.tokenizers = [
            train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280), [text]),
            train_tokenizer(TokenizerConfig(kind="byte"), []),
        ]
        shape = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, context_length=16, intermediate_size=8)
        self.model = Transformer(shape, self.tokenizers[1].vocab_size).eval()
        self.files = self._checkpoint()
        self.tables = _tables()

    def _checkpoint(self) -> dict[str, bytes]:
        from minitf.checkpoints.checkpoint import save_checkpoint
        from minitf.checkpoints.train_state import TrainState

        directory = self.directory / "good"
        tensors = {"random_state": self.model.rotary.flatten(), "pending": self.model.rotary[:, :0]}
        saved = save_checkpoint(
            directory, self.model, self.tokenizers[1], tensors, vars(TrainState()) | {"data": {}}, is_best=True, keep=1
        )
        return {path.name: path.read_bytes() for path in saved.iterdir()}

    def checkpoint(self, data: bytes) -> None:
        """A checkpoint with one damaged file, and with digests that match it or none, as a stranger could send it."""
        from minitf.checkpoints.checkpoint import load_checkpoint, load_optimizer_state
        from minitf.checkpoints.train_state import TrainState

        rng = random.Random(data)
        directory = self.directory / "checkpoint"
        directory.mkdir(exist_ok=True)
        names = sorted(self.files)
        victim = names[data[0] % len(names)] if data else names[0]
        for name, content in self.files.items():
            (directory / name).write_bytes(_damaged(content, data[1:], rng) if name == victim else content)
        if rng.random() < 0.7 and victim != "trainer_state.json":
            (directory / "trainer_state.json").unlink()
        elif victim == "trainer_state.json":
            _sign(directory / "trainer_state.json")
        loaded = load_checkpoint(directory, device="cpu")
        if loaded.state:
            TrainState.from_json(loaded.state)
            load_optimizer_state(directory)

    def data(self, data: bytes) -> None:
        """A damaged file to train on, as text and as pairs, sometimes with another format's extension."""
        from minitf.data.config import DataConfig
        from minitf.tokenizer import TokenizerConfig
        from minitf.training.task import open_task

        rng = random.Random(data)
        name, content = rng.choice(self.tables)
        damaged = content if rng.random() < 0.05 else _damaged(content, data, rng)
        if rng.random() < 0.1:
            name = rng.choice(self.tables)[0]
        if rng.random() < 0.2:
            damaged, name = gzip.compress(damaged, 1), f"{name}.gz"
            damaged = _damaged(damaged, data, rng) if rng.random() < 0.3 else damaged
        path = self.directory / name
        path.write_bytes(damaged)
        cache = self.directory / "cache"
        try:
            config = DataConfig(
                kind=rng.choice(["text", "pairs"]), source="files", files=[str(path)], cache_dir=str(cache),
                bad_rows=rng.choice(["skip", "error"]), long_pairs=rng.choice(["drop", "truncate"]),
            )  # fmt: skip
            with contextlib.redirect_stderr(io.StringIO()):
                open_task(config, TokenizerConfig(kind=rng.choice(["byte", "byte", "char", "bpe"])), None)
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(cache, ignore_errors=True)

    def tokenizer(self, data: bytes) -> None:
        """Encoding and decoding returns the text unchanged."""
        text = data.decode("utf-8", "surrogatepass") if data[:1] < b"\x80" else data.decode("latin-1")
        for tokenizer in self.tokenizers:
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise AssertionError(f"{text!r} became {tokenizer.decode(ids)!r}")
            stream = tokenizer.decode_stream()
            streamed = "".join(stream.step(id_) or "" for id_ in ids) + stream.flush()
            if streamed != text:
                raise AssertionError(f"{text!r} streamed as {streamed!r}")
            if len(tokenizer.pieces(ids)) != len(ids):
                raise AssertionError(f"{text!r}: pieces")

    def tokenizer_file(self, data: bytes) -> None:
        """A damaged tokenizer.json."""
        from minitf.tokenizer import Tokenizer

        path = self.directory / "tokenizer.json"
        path.write_bytes(_damaged(self.files["tokenizer.json"], data, random.Random(data)))
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("The cat"))

    def config(self, data: bytes) -> None:
        """Arguments of a training run, or a damaged config.yaml."""
        from minitf.config.compose import compose_config
        from minitf.config.schema import load_config, save_config

        rng = random.Random(data)
        text = data.decode("utf-8", "replace")
        keys = [
            "model.num_layers",
            "trainer.max_steps",
            "data",
            "data.files",
            "optim.betas",
            "name",
            "seed",
            "attention.probes",
        ]
        argument = f"{rng.choice(keys)}={text}" if rng.random() < 0.7 else text
        if rng.random() < 0.5:
            compose_config([argument])
            return
        good, damaged = self.directory / "good.yaml", self.directory / "config.yaml"
        if not good.exists():
            save_config(compose_config(["model=mini"]), good)
        damaged.write_bytes(_damaged(good.read_bytes(), data, rng))
        load_config(damaged)

    def generation(self, data: bytes) -> None:
        """Options of generation, and a prompt."""
        from minitf.generate import Options, generate_text
        from minitf.inference.sampling import Sampling

        rng = random.Random(data)
        # Mostly valid values: one bad value refuses the request before the others have any effect.
        allowed: list[list[Any]] = [
            [1, 2, 5, 20], [None, 0, 1, -1, 1 << 31, (1 << 63) - 1],
            [0, 0.7, 1e-6, 1e6], [0, 1, 3, 1000], [1e-6, 0.5, 1], [0, 0.05, 1], [1e-9, 1.3, 1e9],
        ]  # fmt: skip
        bad = [value for value in INTERESTING if isinstance(value, int | float)] + [0.5, 1.5]
        picked = [rng.choice(bad if rng.random() < 0.05 else values) for values in allowed]
        max_tokens = picked[0] if picked[0] < 20 else 20  # longer texts take longer and show nothing new
        sampling = Sampling(*picked[2:])
        stop = (data[:3].decode("latin-1"),) if rng.random() < 0.5 else ()
        options = Options(max_tokens, picked[1], stop, sampling)
        generate_text(
            self.model, self.tokenizers[1], data.decode("utf-8", rng.choice(["replace", "surrogateescape"])), options
        )


def _sign(path: Path) -> None:
    """Give trainer_state.json the digest of its present content, as a stranger could."""
    from minitf.checkpoints.checkpoint import own_sha256

    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state.pop("own_sha256", None)
        path.write_text(json.dumps({**state, "own_sha256": own_sha256(state)}), encoding="utf-8")
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass


def _damaged(content: bytes, data: bytes, rng: random.Random) -> bytes:
    """Bytes inserted, cut or flipped; in JSON also values replaced; in safetensors a header with a false length."""
    way = rng.randrange(8)
    if way < 4 and content[:1] in (b"{", b"["):
        lines = content.splitlines(keepends=True)
        if len(lines) < 2 or not lines[0].rstrip().endswith(b"}"):
            return _other_value(content, data, rng)
        at = rng.randrange(len(lines))  # JSON lines
        return b"".join([*lines[:at], _other_value(lines[at], data, rng), b"\n", *lines[at + 1 :]])
    if way < 4 and content[8:9] == b"{":  # safetensors: a header after its length
        (length,) = struct.unpack_from("<Q", content)
        header = _other_value(content[8 : 8 + length], data, rng)
        claimed = rng.choice([len(header), len(header), len(header), len(header) + 1, 1 << 40, 0])
        return struct.pack("<Q", claimed) + header + content[8 + length :]
    at = rng.randrange(len(content) + 1)
    if way == 4:
        return content[:at]
    if way == 5:
        return content[:at] + data + content[at:]
    if way == 6:
        return data
    flipped = bytearray(content)
    for byte in data[:20]:
        flipped[rng.randrange(len(flipped))] ^= byte or 1
    return bytes(flipped)


def _other_value(content: bytes, data: bytes, rng: random.Random) -> bytes:
    document = json.loads(content)
    entries: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
            entries.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(entries)
        text = data.decode("utf-8", "replace")
        node[key] = rng.choice([*INTERESTING, text, [text] * 3, len(data), -len(data) / 3])
    if rng.random() < 0.05:
        return content.replace(b"{", b'{"x":' + b"[" * 100_000, 1)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _tables() -> list[tuple[str, bytes]]:
    """Small valid files of every format, as (name, content)."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": f"The cat sat on mat {i}. 世界", "prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(20)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)

    def separated(by: str) -> bytes:
        return "".join(by.join(row) + "\n" for row in [list(rows[0]), *(list(row.values()) for row in rows)]).encode()

    return [
        ("a.txt", " ".join(row["text"] for row in rows).encode()), ("a.md", b"# A title\n\nAnd a text.\r\n" * 20),
        ("a.jsonl", lines.encode()), ("chats.jsonl", "".join(json.dumps(row) + "\n" for row in chats).encode()),
        ("a.json", json.dumps(rows).encode()), ("a.csv", separated(",")), ("a.tsv", separated("\t")),
        ("a.parquet", parquet.getvalue()),
    ]  # fmt: skip
