"""Host memory while a checkpoint with a tensor for each expert is loaded: a rank's share and a block at most."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, QuantConfig, RunConfig
from dora_dist.models.build import build, make_blueprint, sizes_of
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.quant.nf4 import TILE_ELEMENTS
from tests.ranks.measure_fsdp_memory import PeakMemory
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

_ELSEWHERE = 24 << 20  # adapters, the allocator, a piece that is being widened
_QUANTIZING = 8 * 4 * TILE_ELEMENTS  # the tile that is put into 4 bits, in fp32, and what that makes of it


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """Qwen3-MoE, 230 MB in bf16: as it is published, in 16 bits and in FP8."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, num_experts=46, num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {"bf16": {}, "fp8": {}}
    for name, tensor in model.state_dict().items():
        layer, experts, projection = name.partition(".experts.")
        names = [
            f"{layer}{experts}{e}.{side}.weight" for e in range(46 if experts else 0) for side in sides(projection)
        ]
        shape = (tensor.shape[-2] // len(sides(projection)), tensor.shape[-1]) if experts else tensor.shape
        for own in names or [name]:
            tensors["bf16"][own] = torch.full(shape, 0.01, dtype=torch.bfloat16)
            tensors["fp8"][own] = tensors["bf16"][own]
            if experts:
                tensors["fp8"][own] = tensors["bf16"][own].to(torch.float8_e4m3fn)
                tensors["fp8"][f"{own}_scale_inv"] = torch.ones(shape[0] // 128, shape[1] // 128)
    made = {}
    for kind, values in tensors.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        save_file(values, made[kind] / "model.safetensors", {"format": "pt"})
        config.quantization_config = (
            {"quant_method": "fp8", "weight_block_size": [128, 128]} if kind == "fp8" else None
        )
        config.save_pretrained(made[kind])
    return made


def sides(projection: str) -> list[str]:
    return ["gate_proj", "up_proj"] if projection == "gate_up_proj" else ["down_proj"]


def measure(directory: str, out: str, strategy: str, scheme: str) -> None:
    processes = Processes()
    config = RunConfig(
        model=ModelConfig(path=directory),
        dora=DoraConfig(rank=2, targets=["q_proj"]),
        quant=QuantConfig(scheme=scheme),
        data=DataConfig(train="unused"),
        parallel=ParallelConfig(strategy=strategy),
    )
    blueprint = make_blueprint(config, Path(directory), processes.world_size)
    sizes = {name: tensor.nbytes for name, tensor in base_tensors(blueprint.model).items()}
    processes.start(60)
    chosen = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    if strategy == "fsdp":
        chosen.mesh  # noqa: B018 - gloo's own buffers are not the weights'
    with PeakMemory() as loading:
        build(blueprint, chosen)
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    figures = {"base": sum(sizes.values()), "block": block, "loading": loading.growth}
    Path(f"{out}.{processes.rank}").write_text(json.dumps(figures))
    processes.stop()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("strategy", "kind", "scheme"),
    [("fsdp", "bf16", "none"), ("zero3", "bf16", "none"), ("fsdp", "fp8", "none"), ("zero3", "fp8", "nf4")],
)
def test_a_rank_holds_its_share_and_a_block(published, tmp_path, strategy, kind, scheme, ranks):
    done = run_ranks(ranks, measure, str(published[kind]), str(tmp_path / "out"), strategy, scheme)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(ranks):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        print(strategy, kind, scheme, ranks, {name: f"{size >> 20} MiB" for name, size in found.items()})
        scratch = _ELSEWHERE + (_QUANTIZING if scheme == "nf4" else 0)
        assert found["loading"] <= found["base"] / ranks + found["block"] + scratch
