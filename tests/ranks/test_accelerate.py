"""4-bit bases under accelerate's FSDP2 and DeepSpeed: steps, norms, and what each rank holds."""

import copy
import os

import pytest
import torch
from torch import nn

from dora_dist import DoraConfig, QuantConfig, attach_norm_refresh, inject_dora, load_quantized
from dora_dist.dora.norm_cache import dora_layers, find_shards
from dora_dist.models.weights import packed_layers
from dora_dist.parallel.process import Processes
from dora_dist.parallel.zero import import_deepspeed
from tests.support.models import llama, mixture, save_model
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, TRAINED, assert_near

pytestmark = pytest.mark.ranks

IDS = torch.arange(1, 41).view(2, 20)
SETTINGS = ("fsdp", "fsdp, loaded by one rank", "zero2", "zero3")
BASES = {
    "llama": (lambda: llama(hidden_size=64, intermediate_size=127, num_attention_heads=16), "LlamaDecoderLayer"),
    "qwen3_moe": (lambda: mixture("qwen3_moe"), "Qwen3MoeDecoderLayer"),
}


def accelerator_for(setting: str, block: str):
    """A new accelerator; these are singletons, and take no FSDP on CPUs by themselves."""
    import accelerate
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if setting.startswith("fsdp"):
        PartialState(cpu=True, backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        by_one = setting == "fsdp, loaded by one rank"
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": str(by_one).lower()}
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=by_one, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[block],
        )  # fmt: skip
        return accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    plugin = accelerate.DeepSpeedPlugin(zero_stage=int(setting[-1]), gradient_accumulation_steps=1)
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0
    }  # fmt: skip
    return accelerate.Accelerator(deepspeed_plugin=plugin)


def model_from(directory: str) -> nn.Module:
    model = load_quantized(directory, QuantConfig(scheme="nf4", skip=["lm_head"]), dtype=torch.float32)
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # A is drawn anew; accelerate makes the ranks alike
    return inject_dora(model, DoraConfig(rank=2, alpha=6, targets="all-linear"))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def steps(model: nn.Module, backward, optimizer) -> list[float]:
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_setting(setting: str, directory: str, block: str) -> None:
    accelerator = accelerator_for(setting, block)
    model = model_from(directory)
    if accelerator.is_main_process or setting != "fsdp, loaded by one rank":
        torch.manual_seed(0)
        for layer in dora_layers(model).values():
            layer.reset_parameters()
            nn.init.normal_(layer.lora_B, std=0.1)
    plain = copy.deepcopy(model)
    whole = {name: held.layout for name, held in named_packed(plain).items()}
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    model = accelerator.unwrap_model(prepared)
    attach_norm_refresh(model, optimizer)
    losses = steps(prepared, accelerator.backward, optimizer)
    if accelerator.is_main_process:
        want = optimizer_of(plain)
        wanted = steps(plain, torch.Tensor.backward, want)
        assert losses == pytest.approx(wanted, rel=TRAINED), f"{setting}: {losses}, not {wanted}"
    shards = find_shards(model)
    shards.reshard(model)
    plain_layers = dora_layers(plain)
    for name, layer in dora_layers(model).items():
        got = shards.gather([layer.lora_A, layer.lora_B, layer.magnitude])
        A, B = (t.double() for t in got[:2])
        if accelerator.is_main_process:
            own = plain_layers[name]
            for tensor, of in zip(got, (own.lora_A, own.lora_B, own.magnitude), strict=True):
                assert_near(tensor, of, MODEL, about=name)
            rank, dense = layer.spec.rank, own.matrix[:].double()
            for e, rows in enumerate(dense.chunk(layer.num_experts)):
                out = slice(e * layer.out_features, (e + 1) * layer.out_features)
                V = rows + layer.spec.scaling * B[out] @ A[e * rank : (e + 1) * rank]
                assert_near(layer.norm[out], V.norm(dim=1), MODEL, about=name)
    stored = [part for each in named_packed(model).values() for part in each.weight_parts]
    held = sum(own.values.nbytes for part in stored for own in shards.rectangles(part))
    all_bytes = sum(sum(part.nbytes for part in layout.empty(torch.device("cpu"))) for layout in whole.values())
    parts = 1 if setting == "zero2" else accelerator.num_processes
    print(setting, held, all_bytes, flush=True)
    assert abs(held * parts - all_bytes) <= 0.02 * all_bytes, setting


def named_packed(model: nn.Module) -> dict:
    held = set(packed_layers(model).values())
    return {name: module for name, module in model.named_modules() if module in held}


def check(directory: str, *cases: tuple[str, str]) -> None:
    import_deepspeed(Processes())  # without what it would compile
    for base, setting in cases:
        check_setting(setting, f"{directory}/{base}", BASES[base][1])


FEW = [("llama", "fsdp, loaded by one rank"), ("llama", "zero3"), ("qwen3_moe", "fsdp"), ("qwen3_moe", "zero3")]
MORE = [(base, setting) for base in BASES for setting in SETTINGS if (base, setting) not in FEW]


@pytest.mark.parametrize("cases", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_a_four_bit_base(cases, tmp_path):
    for base, (make, _) in BASES.items():
        save_model(make(), tmp_path / base)
    done = run_ranks(2, check, str(tmp_path), *cases)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
