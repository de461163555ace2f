"""A decoding step at batch 1 on a GPU: decode.cu, one kernel that stays on every multiprocessor for the whole step.

A CUDA graph of a step starts a hundred kernels, 2.5 us each. This one is bound by how fast a token's values get from
multiprocessor to multiprocessor, five times a layer, while the weights stream in behind that.
"""

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.decoding.arrival import Arrival
from minitf.decoding.step import Step
from minitf.machine.cuda_program import CudaKernel, CudaProgram
from minitf.model import Transformer

NUM_WARPS = 8  # that compute; one more copies
SLOT_BYTES = 12_288  # at least; of the ring in shared memory through which weights and cache go
SLOTS_PER_SPLIT = 2  # at least, of the part of a context that one block attends to
REPLICAS = 8  # of what multiprocessors tell each other: a line that all ask for at once is slow
PARTIALS = 64  # floats of a warp for its part of products
MOST_UNHEARD = 16  # steps that may have told the host something it has not looked at

_POINTERS = (
    *("qkv", "o", "gate_up", "down", "vocabulary", "embedding", "q_norm", "k_norm", "rotary", "keys", "values"),
    *("exchange", "starts", "ids", "logits", "likeliest", "told", "stamps"),
)


class Arguments(ctypes.Structure):
    """The parameter of the kernel, as in decode.cu."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        *[(name, ctypes.c_longlong) for name in ("capacity", "position", "set")],
    ]


@dataclass(frozen=True)
class Plan:
    """How a model's step is laid out on a GPU; all of it is compiled in."""

    num_blocks: int
    num_warps: int
    slot_bytes: int
    num_slots: int
    shared_bytes: int
    exchange_floats: int  # in each of the two sets
    definitions: tuple[tuple[str, str], ...]

    @property
    def num_threads(self) -> int:
        return 32 * (self.num_warps + 1)


def padded(width: int) -> int:
    """Columns of a row of weights in memory."""
    return -(-width // 64) * 64


def plan(
    model: Transformer,
    num_blocks: int,
    most_shared_bytes: int,
    num_warps: int = NUM_WARPS,
    slot_bytes: int = SLOT_BYTES,
) -> Plan | str:
    """The layout for so many multiprocessors with so much shared memory, or why there is none."""
    c = model.config
    D, H, G, K, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
    for name, size in (("hidden_size", D), ("head_dim", K), ("intermediate_size", F)):
        if size % 8:
            return f"model.{name}={size} is not a multiple of 8"
    if K > 256:
        return f"model.head_dim={K} is above 256"

    # A slot takes whole rows, of gate and up a pair, and the keys and values of a few positions.
    pairs = max(slot_bytes // (4 * padded(D)), 1)
    slot_bytes = -(-max(pairs * 4 * padded(D), 2 * padded(F), 2 * padded(H * K), 4 * K) // 128) * 128
    own_rows = -(-D // num_blocks)
    others = 4 * (padded(max(D, F, H * K)) + 9 * K + num_warps * (K + PARTIALS) + own_rows)
    room = most_shared_bytes - others - 1024
    num_slots = room // (slot_bytes + 16)
    if num_slots < 2:
        return f"a row of weights takes {slot_bytes} bytes of {most_shared_bytes} of shared memory"
    positions = SLOTS_PER_SPLIT * max(slot_bytes // (4 * K), 1)
    splits = max(min(num_blocks // H, -(-model.rotary.shape[1] // positions)), 1)
    layer = (H + 2 * G) * K + H * splits * (K + 4) + 2 * D + F
    sizes = {
        "NUM_LAYERS": c.num_layers, "D": D, "H": H, "G": G, "K": K, "F": F, "VOCABULARY": model.vocab_size,
        "NUM_POSITIONS": model.rotary.shape[1], "QK_NORM": int(c.qk_norm), "NORM_EPS": f"{c.rms_norm_eps!r}f",
        "EMBEDDING_BF16": int(model.model.embed_tokens.weight.dtype == torch.bfloat16),  # type: ignore[union-attr]
        "BLOCKS": num_blocks, "WARPS": num_warps, "SLOT_BYTES": slot_bytes, "NUM_SLOTS": num_slots,
        "MOST_SPLITS": splits, "REPLICAS": REPLICAS,
    }  # fmt: skip
    return Plan(
        num_blocks, num_warps, slot_bytes, num_slots, num_slots * (slot_bytes + 16) + others + 1024,
        REPLICAS * (c.num_layers * layer + (num_blocks + 1) // 2 * 4),
        tuple((name, str(size)) for name, size in sizes.items()),
    )  # fmt: skip


def _plan_for(model: Transformer) -> Plan | str:
    properties = torch.cuda.get_device_properties(model.device)
    shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return plan(model, properties.multi_processor_count, shared_bytes)


def obstacle(model: Transformer, batch_size: int) -> str | None:
    """Why this step cannot serve so many rows of this model, or None."""
    if model.device.type != "cuda":
        return f"it runs on a CUDA device, and the model is on {model.device.type}"
    if batch_size != 1:
        return f"it decodes one text at a time, not {batch_size}"
    if model.compute_dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the model in {str(model.compute_dtype).removeprefix('torch.')}"
    dtype = model.model.embed_tokens.weight.dtype  # type: ignore[union-attr]
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it reads embeddings in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(model.device) < (9, 0):
        return "it copies as GPUs of compute capability 9.0 and above can"
    planned = _plan_for(model)
    if isinstance(planned, str):
        return planned
    found = kernel(planned, model.device)
    return found if isinstance(found, str) else None


_kernels: dict[tuple[Plan, torch.device], CudaKernel | str] = {}


def kernel(planned: Plan, device: torch.device) -> CudaKernel | str:
    """The compiled step of a plan, or why there is none."""
    key = planned, device
    if key not in _kernels:
        program = CudaProgram(Path(__file__).with_name("decode.cu"), planned.definitions, "decode")
        _kernels[key] = program.load(device)
    return _kernels[key]


def packed(weights_LRC: Tensor) -> Tensor:
    """Rows filled up with zeros to whole 64 columns, of which in odd rows the second half comes first.

    So two neighbouring rows, which a warp reads at once, lie in different banks of shared memory.
    """
    L, R, C = weights_LRC.shape
    rows = torch.nn.functional.pad(weights_LRC, (0, padded(C) - C)).view(L, R, padded(C) // 64, 2, 32)
    rows[:, 1::2] = rows[:, 1::2].flip(3)
    return rows.view(L, R, padded(C))


class Weights:
    """A model's weights in bfloat16 as the kernel reads them, the norms' part of the matrices that follow them."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        layers = [dict(block.named_parameters()) for block in model.model.layers]  # type: ignore[union-attr]

        def stacked(names: list[str], norm: str | None = None, in_turn: bool = False) -> Tensor:
            matrices = []
            for weights in layers:
                parts = [weights[f"{name}.weight"] for name in names]
                joint = torch.stack(parts, 1).flatten(0, 1) if in_turn else torch.cat(parts)
                matrices.append((joint * weights[f"{norm}.weight"] if norm else joint).bfloat16())
            return packed(torch.stack(matrices))

        self.qkv = stacked([f"self_attn.{name}_proj" for name in "qkv"], "input_layernorm")
        self.o = stacked(["self_attn.o_proj"])
        self.gate_up = stacked(["mlp.gate_proj", "mlp.up_proj"], "post_attention_layernorm", in_turn=True)
        self.down = stacked(["mlp.down_proj"])
        vocabulary_VD = model.vocabulary_VD * model.model.norm.weight  # type: ignore[union-attr,operator]
        self.vocabulary = packed(vocabulary_VD.bfloat16()[None])
        self.embedding = model.model.embed_tokens.weight.detach()  # type: ignore[union-attr,operator]
        self.rotary = model.rotary.float().contiguous()
        self.q_norm = self.k_norm = self.rotary  # any address
        if model.config.qk_norm:
            self.q_norm, self.k_norm = (
                torch.stack([weights[f"self_attn.{name}_norm.weight"] for weights in layers]).float() for name in "qk"
            )


# Memory of the host for what the kernel tells. It is not given back: a step that nobody waits for any more writes, too.
_spare: list[Tensor] = []


class PersistentStep(Step):
    """Reads one token after the other into `cache` and scores the next, without waiting for the GPU."""

    finds_likeliest = True

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        planned = _plan_for(model)
        assert not isinstance(planned, str)
        found = kernel(planned, model.device)
        assert not isinstance(found, str)
        self._prepare(model, cache, planned, found)

    def _prepare(self, model: Transformer, cache: KeyValueCache, planned: Plan, found: CudaKernel) -> None:
        device = model.device
        self.cache, self.device, self.vocab_size, self.kernel = cache, device, model.vocab_size, found
        self.weights = Weights(model)
        self.exchange = torch.full((2, planned.exchange_floats), -1, dtype=torch.int32, device=device)
        on_cuda = device.type == "cuda"
        self.all_told = _spare.pop() if _spare else torch.zeros(MOST_UNHEARD, 2, dtype=torch.long, pin_memory=on_cuda)
        weakref.finalize(self, _spare.append, self.all_told)
        self.num_steps = 0
        a = self.arguments = Arguments(capacity=cache.capacity)
        for name, tensor in vars(self.weights).items():
            setattr(a, name, tensor.data_ptr())
        a.keys, a.values, a.exchange = cache.keys.data_ptr(), cache.values.data_ptr(), self.exchange.data_ptr()
        found.prepare(planned.num_blocks, planned.num_threads, planned.shared_bytes, a)

    def __call__(self, ids_1T: Tensor) -> Tensor:
        """Logits_1V after ids_1T, read from the position `cache.length` on, which the caller advances."""
        return self._read(ids_1T)[0]

    def likeliest(self, ids_1T: Tensor) -> Arrival:
        """As a call, but the id with the largest logit."""
        return Arrival(*self._read(ids_1T)[1:])

    def _read(self, ids_1T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last logits_1V, the id of the largest, and where that id and whether all logits are finite will be told,
        in the host's memory."""
        ids_1T, a, starts_1 = ids_1T.contiguous(), self.arguments, self.cache.starts_B
        logits_1V = torch.empty(1, self.vocab_size, device=self.device)
        likeliest_1 = torch.empty(1, dtype=torch.long, device=self.device)
        a.logits, a.likeliest = logits_1V.data_ptr(), likeliest_1.data_ptr()
        a.starts = None if starts_1 is None else starts_1.data_ptr()
        for t in range(ids_1T.shape[1]):
            told = self.all_told[self.num_steps % MOST_UNHEARD]
            a.ids, a.told = ids_1T[:, t].data_ptr(), told.data_ptr()
            a.position, a.set = self.cache.length + t, self.num_steps % 2
            self.num_steps += 1
            self.kernel.launch()
        return logits_1V, likeliest_1, told
