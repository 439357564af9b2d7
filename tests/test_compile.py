"""torch.compile: a layer is one graph, and computes what it computes without."""

import pytest
import torch
from torch import nn

from dora_dist.layers import AdapterSpec, DoraLinear
from dora_dist.quant import Nf4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "spec",
    [AdapterSpec(4, 2.0), AdapterSpec(4, 2.0, axis="in"), AdapterSpec(4, 2.0, norm_gradient="exact")],
    ids=["out", "in", "exact"],
)
def test_a_layer_is_one_graph(spec, packed, dtype):
    torch.manual_seed(0)
    torch.compiler.reset()  # a few variants of one function are all that it keeps
    linear = nn.Linear(70, 48, dtype=dtype)
    layer = DoraLinear(linear.weight, linear.bias, spec)
    if packed:
        layer.pack(Nf4(48, 70, dtype))
    layer.reset_parameters()
    layer.norm_is_cached = True
    nn.init.normal_(layer.lora_B, std=0.1)
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
        torch.testing.assert_close(compiled, eager)
