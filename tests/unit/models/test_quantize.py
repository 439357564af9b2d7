"""Which layers of a model are put into 4 bits, and what each rank then holds of them."""

import json

import pytest
import torch
from torch import nn

from dora_dist.config import DoraConfig, QuantConfig
from dora_dist.dora.experts import DoraExperts
from dora_dist.dora.inject import inject_dora
from dora_dist.errors import UserError
from dora_dist.models.quantize import pack_linears
from dora_dist.quant.modules import FrozenExperts, PackedLinear
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.rounding import roundings
from tests.support.small import small_model


def test_linear_layers_are_packed_but_for_those_skipped():
    def model() -> nn.Module:
        blocks = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q", "k", "free", "kept", "lm_head")})
        return inject_dora(blocks, DoraConfig(rank=2, targets=["q"], modules_to_save=["kept"]))

    packed = model()
    before = packed["q"](torch.ones(1, 64))
    pack_linears(packed, QuantConfig(scheme="nf4", skip=["lm_head", "k"]))
    assert packed["q"].layout is not None and isinstance(packed["free"], PackedLinear)
    assert all(type(packed[name]) is nn.Linear for name in ("k", "kept", "lm_head"))
    assert (packed["q"](torch.ones(1, 64)) - before).norm() < 0.3 * before.norm()  # 4 bits, and terms that cancel
    shared = model()
    shared.add_module("again", shared["free"])
    shared.add_module("q_again", shared["q"])
    shared.add_module("pre_kept", nn.Linear(64, 64))  # PEFT takes it for `kept`
    pack_linears(shared, QuantConfig(scheme="nf4"))
    assert shared["again"] is shared["free"] and isinstance(shared["again"], PackedLinear)
    assert shared["q_again"] is shared["q"] and shared["q"].layout.columns == 64
    assert type(shared["pre_kept"]) is nn.Linear
    x = torch.randn(3, 64)
    wide = {name: packed[name](x) for name in ("q", "free")}
    packed.to(torch.bfloat16)
    for name, before in wide.items():  # what the codes stand for is rounded, the scales are not
        layer = packed[name]
        assert layer.weight_ranges.dtype == torch.float32 and layer.base_dtype == torch.bfloat16
        assert (layer(x.bfloat16()) - before).norm() < roundings(4, torch.bfloat16) * before.norm()
        assert layer.weight.dtype == torch.uint8
    with pytest.raises(UserError, match=r"quant\.skip: 'kk'.*did you mean 'k'"):
        pack_linears(model(), QuantConfig(scheme="nf4", skip=["kk"]))
    with pytest.raises(UserError, match="power of two"):
        QuantConfig(block_size=96)


def test_layers_whose_weight_the_model_reads_stay_in_16_bits():
    """T5 asks `wo` for its dtype, Mamba multiplies by `dt_proj.weight`."""
    names = ("q", "wo", "wide", "dt_proj")
    model = inject_dora(nn.ModuleDict({n: nn.Linear(64, 64) for n in names}), DoraConfig(rank=2, targets=["q"]))
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = ["wo"], ["wide"]
    pack_linears(model, QuantConfig(scheme="nf4"))
    assert {name for name in names if model[name].weight.dtype == torch.uint8} == {"q"}


def test_blocks_are_no_longer_than_rows_need():
    for columns, block_size in ((768, 1024), (1024, 1024), (40, 64), (3, 32), (9000, 4096)):
        model = nn.ModuleDict({"q": nn.Linear(columns, 2)})
        pack_linears(
            inject_dora(model, DoraConfig(rank=1, targets=["q"])), QuantConfig(scheme="nf4", block_size=4096)
        )
        assert model["q"].layout.block_size == block_size


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.ranks
def test_a_rank_holds_its_share_of_half_a_byte_per_weight(ranks, tmp_path):
    out = tmp_path / "held.json"
    done = run_ranks(ranks, ROOT / "tests/ranks/measure_packed.py", str(out), "fsdp", "zero3")
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(out.read_text())
    assert measured["whole"] < 0.54 * measured["elements"]
    for strategy, held in measured["held"].items():
        for bytes_of_rank in held:
            assert bytes_of_rank == pytest.approx(measured["whole"] / ranks, rel=0.02), strategy


def test_experts_are_packed_by_rows_whether_adapted_or_not():
    """Qwen3-MoE: one projection adapted, one beside it not, a layer without any adapter, and what is skipped."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = small_model("qwen3_moe", sizes={"num_hidden_layers": 3}).bfloat16()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
        return inject_dora(made, DoraConfig(rank=2, targets=["layers.0.mlp.experts.down_proj", "q_proj"]))

    dense, packed = model(), model()
    pack_linears(packed, QuantConfig(scheme="nf4", skip=["lm_head", "layers.2.mlp.experts"]))
    held = [layer.mlp.experts for layer in packed.model.layers]
    assert isinstance(held[0].down_proj, DoraExperts) and isinstance(held[0].gate_up_proj, FrozenExperts)
    for projection in (held[0].down_proj, held[0].gate_up_proj, held[1].down_proj, held[1].gate_up_proj):
        out, columns = projection.out_features, projection.in_features
        assert projection.layout.shape == (4 * out, columns)
        stored = sum(part.nbytes for part in projection.weight_parts)
        blocks = -(-columns // projection.layout.block_size)
        assert stored == 4 * out * (blocks * projection.layout.block_size // 2 + blocks + 8)
    assert type(held[2]) is type(dense.model.layers[2].mlp.experts) and held[2].down_proj.dim() == 3
    x, index, weights = torch.randn(9, 32).bfloat16(), torch.randint(4, (9, 2)), torch.rand(9, 2).bfloat16()
    for number in (0, 1):
        experts, own = held[number], dense.model.layers[number].mlp.experts
        for key in ("gate_up_proj", "down_proj"):  # the same weights, dense
            matrix = getattr(experts, key).matrix[:]
            if number == 0:
                getattr(own, key).weight.data.copy_(matrix)
            else:
                getattr(own, key).data.copy_(matrix.view_as(getattr(own, key)))
        x.requires_grad_()
        y, wanted = experts(x, index, weights), own(x, index, weights)
        assert (y - wanted).norm() <= roundings(8, torch.bfloat16) * wanted.norm()
        grads = [torch.autograd.grad(each.float().square().sum(), x)[0] for each in (y, wanted)]
        assert (grads[0] - grads[1]).norm() <= roundings(16, torch.bfloat16) * grads[1].norm()
    with pytest.raises(UserError, match=r"quant\.skip: 'expert' matches no linear layer.*experts"):
        pack_linears(model(), QuantConfig(scheme="nf4", skip=["expert"]))
