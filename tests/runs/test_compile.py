"""torch.compile: a layer is one graph, and computes what it computes without."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from dora_dist import DoraConfig, inject_dora
from dora_dist.cli import main
from dora_dist.device import constant_when_compiled
from dora_dist.dora.experts import ExpertsForward, exclude_from_compilation
from dora_dist.dora.layers import AdapterSpec, DoraLinear
from dora_dist.dora.norm_cache import cache_norms
from dora_dist.quant.nf4 import Nf4
from dora_dist.training.trainer import Trainer
from tests.support import ROOT
from tests.support.rounding import MODEL, assert_near, rounding, roundings
from tests.support.small import small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(4, 2.0),
        AdapterSpec(4, 2.0, axis="in"),
        AdapterSpec(4, 2.0, norm_gradient="exact"),
        AdapterSpec(4, 2.0, magnitude=False),
    ],
    ids=["out", "in", "exact", "lora"],
)
def test_a_layer_is_one_graph(spec, packed, dtype):
    torch.manual_seed(0)
    torch.compiler.reset()  # a few variants of one function are all that it keeps
    linear = nn.Linear(70, 48, bias=not packed, dtype=dtype)
    layer = DoraLinear(linear.weight, linear.bias, spec)
    if packed:
        layer.pack(Nf4(48, 70, dtype))
    layer.reset_parameters()
    layer.norm_is_cached = True
    nn.init.normal_(layer.lora_B, std=0.1)
    if spec.magnitude:
        layer.renew_norm(layer.current_norm())
    x = torch.randn(2, 5, 70, dtype=dtype, requires_grad=True)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = forward(x)
        grads = torch.autograd.grad(
            y.float().square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]
        )
        results.append([y, *grads])
    for eager, compiled in zip(*results, strict=True):
        if dtype == torch.float32:
            assert_near(compiled, eager, 70 + 48)
        else:
            assert (compiled - eager).norm() <= roundings(2, dtype) * eager.norm()


@pytest.mark.slow
def test_experts_run_uncompiled_inside_compiled_blocks(monkeypatch):
    """How many tokens each expert has is no constant of a graph: other rows would be compiled anew."""
    monkeypatch.setattr(ExpertsForward, "forward", ExpertsForward.forward)  # put back behind this test
    torch.compiler.reset()
    model, graphs = small_model("qwen3_moe"), []
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate.weight)
    inject_dora(model, DoraConfig(rank=2, targets="all-linear"))
    cache_norms(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.arange(row, row + 9)[None] for row in range(0, 60, 10)]

    def gradients():
        return [torch.autograd.grad(model(ids).logits.square().sum(), trained) for ids in rows]

    def backend(graph, _):
        graphs.append(len(results))
        return graph.forward

    results, eager = [], gradients()
    exclude_from_compilation()
    for block in model.model.layers:
        block.compile(backend=backend)
    for ids in rows:
        results.append(torch.autograd.grad(model(ids).logits.square().sum(), trained))
    assert set(graphs) == {0}, "all graphs are made for the first row"
    for compiled, wanted in zip(results, eager, strict=True):
        for a, b in zip(compiled, wanted, strict=True):
            assert (a - b).norm() <= rounding(MODEL, torch.float32) * b.norm() + 1e-8


def test_sampling_compiles_nothing(tiny_llama, tiny_rows, tmp_path, monkeypatch):
    """Graphs for a cache's layers, one each, would use up what dynamo keeps: training would run without any."""
    graphs, seen = [], []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def noted(trainer, *arguments, sample=Trainer.sample):
        before = len(graphs)
        texts = sample(trainer, *arguments)
        seen.append((before, len(graphs), len(texts)))
        return texts

    monkeypatch.setattr(Trainer, "sample", noted)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counting))
    torch.compiler.reset()
    overrides = [
        f"model.path={tiny_llama}", "model.dtype=float32", f"data.train={tiny_rows}", "data.seq_len=48",
        "dora.rank=2", "train.steps=2", "train.compile=true", "parallel.strategy=single",
        "log.sample_prompts=[alpha]", "log.sample_tokens=3", f"output_dir={tmp_path}",
    ]  # fmt: skip
    assert (
        main(["train", "--config", str(ROOT / "configs" / "quickstart.yaml"), *overrides, "data.eval=null"]) == 0
    )
    (first, second) = seen
    assert first == (0, 0, 1) and second[0] == second[1] > 0


def test_constants_are_marked_as_torch_marks_them():
    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs))
