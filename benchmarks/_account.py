"""What a QDoRA model under `fsdp` needs, counted term by term from its shape: nothing here is measured.

block_memory.py measures the terms of one block against this. Bytes throughout. A Llama: seven linear layers a
block, all adapted and in 4 bits (NF4, blocks of 64, double quantization); embeddings, head and norms in 16 bits.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dora_dist.config import RunConfig
from dora_dist.loss import _CHUNK_BYTES, _LEAST_ROWS

Terms = dict[str, float]
_READ = 17 << 20  # scratch while 2^20 weights are quantized: three fp32 copies, codes of 4 bytes and of 1


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Of one block: name -> (out, in)."""
        H, M, K = self.hidden, self.intermediate, self.kv
        return {
            "self_attn.q_proj": (H, H), "self_attn.k_proj": (K, H), "self_attn.v_proj": (K, H),
            "self_attn.o_proj": (H, H), "mlp.gate_proj": (M, H), "mlp.up_proj": (M, H), "mlp.down_proj": (H, M),
        }  # fmt: skip

    def checkpoint(self) -> dict[str, tuple[int, int]]:
        """Every tensor of the files: name -> (rows, columns), 0 columns for a vector."""
        found = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in self.linears().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{layer}.{norm}.weight"] = (self.hidden, 0)
        return found | {"model.norm.weight": (self.hidden, 0), "lm_head.weight": (self.vocabulary, self.hidden)}

    def parts(self, rank: int) -> dict[str, list[int]]:
        """Bytes of every tensor of one block, whole: kind -> one number a tensor."""
        sizes = self.linears().values()
        return {
            "codes": [rows * columns // 2 for rows, columns in sizes],
            "scales": [size for rows, columns in sizes for size in (rows * -(-columns // 64), rows * 8)],
            "trained": [4 * size for rows, columns in sizes for size in (rank * columns, rank * rows, rows)],
            "norms": [2 * self.hidden] * 2,
        }

    def block(self, rank: int) -> int:
        return sum(sum(sizes) for sizes in self.parts(rank).values())

    @property
    def dense(self) -> int:
        """The largest weight in 16 bits, as it is dequantized."""
        return 2 * max(rows * columns for rows, columns in self.linears().values())

    @property
    def head(self) -> int:
        return 2 * self.vocabulary * self.hidden

    def kept_per_token(self, rank: int) -> int:
        """What one block keeps from its forward for its backward.

        Per hidden feature: both norms' fp32 input and 16-bit output (12), the outputs of q, o and down (6), what
        attention takes as q and gives (4). Per kv feature: the outputs of k and v (4) and the keys that attention
        takes (2; the values are v's output). Per intermediate feature: the outputs of gate and up, which SiLU and
        the product take as they are, SiLU's, and down's input (8). Of each layer x A^T (2 a rank), of each norm
        and head an fp32 number.
        """
        small = 2 * rank * len(self.linears()) + 4 * 2 + 4 * self.heads
        return 22 * self.hidden + 6 * self.kv + 8 * self.intermediate + small

    def counted(self, rank: int, ranks: int) -> Terms:
        """What one rank of `ranks` should hold of this shape, where everything is sharded: named as measured."""
        parts = {kind: sum(sizes) * self.layers for kind, sizes in self.parts(rank).items()}
        base = (parts["codes"] + parts["scales"]) / ranks
        norms = 4 * self.layers * sum(rows for rows, _ in self.linears().values())
        other = (2 * self.head + parts["norms"] + 2 * self.hidden + parts["trained"]) / ranks
        held = base + other + norms
        gathered = 2 * self.block(rank) if ranks > 1 else 0  # as received, and copied out
        with_states = held + 2 * parts["trained"] / ranks
        # The final norm keeps its fp32 input too; the first one does not, for nothing before it is trained.
        kept = self.layers * self.kept_per_token(rank) + 4 + 4 * self.vocabulary
        return {
            "base_bytes": base,
            "held_bytes": held,
            "loading_peak_bytes": held + _READ,
            "loading_limit_bytes": held + self.dense,
            "held_after_steps_bytes": with_states,
            "saved_per_token": kept,
            "between_per_token": kept,
            "between_fixed_bytes": with_states,
            "step_peak_per_token": kept,
            "step_peak_fixed_bytes": with_states + gathered + self.dense,
        }


NORMS = "norms"
RECEIVED = ("gathered: own rows, from the host", "gathered: as received")
MOMENTS = ("head and loss, forward", "a block, backward", NORMS)
SHAPE_70B = Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256)


def account(shape: Shape, config: RunConfig, ranks: int) -> dict[str, Any]:
    """Of a run with `cpu_offload` and activation checkpointing on `ranks` GPUs: what each rank holds in host
    memory, and what each GPU holds in the moments that may be its fullest."""
    rank, rows, length = config.dora.rank, config.train.micro_batch_size, config.data.seq_len
    host = host_terms(shape, rank, ranks)
    gpu, doubled = (gpu_terms(shape, config, ranks, rows * size) for size in (length, 2 * length))
    return {
        "settings": {"ranks": ranks, "tokens": rows * length, "rank": rank, **asdict(shape)},
        "host": host,
        "host_total": {kind: sum(term[kind] for term in host.values()) for kind in ("bytes", "pinned")},
        "reading": shape.head / ranks,  # the head's rows as they are read, before they are copied
        "gpu": gpu,
        "gpu_total": totals(gpu),
        "gpu_total_doubled": totals(doubled),
        "gpu_pools": pools(gpu),
    }


def host_terms(shape: Shape, rank: int, ranks: int) -> dict[str, Terms]:
    """Of one rank: each term's bytes, and its bytes as pinned memory, whose blocks are powers of two."""
    parts = shape.parts(rank)
    outside = {"embeddings and output head, 16-bit": [shape.head] * 2, "norm weights, 16-bit": [2 * shape.hidden]}
    tensors = {
        "4-bit codes": parts["codes"] * shape.layers,
        "scales (8 bits) and their ranges": parts["scales"] * shape.layers,
        "embeddings and output head, 16-bit": outside["embeddings and output head, 16-bit"],
        "norm weights, 16-bit": parts["norms"] * shape.layers + outside["norm weights, 16-bit"],
        "A, B and m, fp32": parts["trained"] * shape.layers,
        "their gradients, fp32": parts["trained"] * shape.layers,
    }
    terms = {
        name: {"bytes": sum(sizes) / ranks, "pinned": float(sum(power_of_two(size / ranks) for size in sizes))}
        for name, sizes in tensors.items()
    }
    moments = 2 * sum(parts["trained"]) * shape.layers / ranks
    terms["Adam's two moments, fp32 (not pinned)"] = {"bytes": moments, "pinned": moments}
    return terms


def gpu_terms(shape: Shape, config: RunConfig, ranks: int, tokens: int) -> dict[str, Terms]:
    """Term -> moment -> bytes on each GPU. A group (block, embedding, head) that is
    gathered costs its own rows copied from the host, the buffer that all ranks' rows arrive in, and the parameters
    copied out of it."""
    rank = config.dora.rank
    block, head, V, H = shape.block(rank), shape.head, shape.vocabulary, shape.hidden
    trained = sum(shape.parts(rank)["trained"]) * shape.layers
    norms = 4 * shape.layers * sum(out for out, _ in shape.linears().values())
    factors = 4 * rank * shape.layers * sum(columns for _, columns in shape.linears().values())
    accumulates = config.train.accumulation > 1
    in_use, forward, recompute = MOMENTS[:-1], *MOMENTS[:-1]
    chunk = min(tokens, max(_CHUNK_BYTES // (4 * V), _LEAST_ROWS))
    terms: dict[str, Terms] = {
        "norms of all layers, fp32": dict.fromkeys(MOMENTS, norms),
        "gradients of A, B and m, whole, until the last micro-batch": dict.fromkeys(in_use, trained * accumulates),
        "checkpoints: each block's input": dict.fromkeys(in_use, 2 * shape.layers * H * tokens),
        "the final norm's input, 16-bit and fp32": {forward: 6 * H * tokens},
        RECEIVED[0]: {forward: head / ranks, recompute: block / ranks},
        RECEIVED[1]: {forward: head + block, recompute: block},
        "gathered: copied out": {forward: head, recompute: block},
        "logits of a chunk and their gradient, 16-bit and fp32": {forward: 12 * V * chunk},
        "the gradient of the head's input, 16-bit": {forward: 2 * H * tokens},
        "kept by the block that recomputes": {recompute: shape.kept_per_token(rank) * tokens},
        "the largest layer's weight, dequantized": {recompute: shape.dense},
        "gradients inside the block, 16-bit and fp32": {recompute: 12 * shape.intermediate * tokens},
        "the block's gradients of A, B and m, whole, sent and received": {
            recompute: (2 + 1 / ranks) * trained / shape.layers,
        },
        "A's of all layers, fp32: sent, received, sorted": {NORMS: (2 + 1 / ranks) * factors},
        "sums and scratch of the norms": {NORMS: norms + (16 << 20)},
    }  # fmt: skip
    return {name: cells for name, cells in terms.items() if any(cells.values())}


def totals(terms: dict[str, Terms]) -> Terms:
    return {moment: sum(cells.get(moment, 0) for cells in terms.values()) for moment in MOMENTS}


def pools(terms: dict[str, Terms]) -> float:
    """What torch may reserve: a pool for the stream that gathers and one for the rest, each at its largest."""
    received = {moment: sum(terms[name].get(moment, 0) for name in RECEIVED) for moment in MOMENTS}
    return max(received.values()) + max(size - received[moment] for moment, size in totals(terms).items())


def power_of_two(size: float) -> int:
    """What torch's pinned allocator takes for `size` bytes."""
    return 1 << (math.ceil(size) - 1).bit_length()
