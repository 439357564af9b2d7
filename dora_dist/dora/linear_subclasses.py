"""Which subclasses of nn.Linear compute what it computes, so that DoRA may take their place. Their names do not
matter, what they compute does."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_OUT, _IN = 3, 5


def computes_linear(module: nn.Module) -> bool:
    """Whether `module`, of a subclass of nn.Linear, holds a weight and a bias alone and computes x W^T + bias."""
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # the latter's weight nn.MultiheadAttention reads, without calling the layer
    # Quantized weights, parametrizations and the like: what a DoraLinear would drop.
    if type(module.weight) is not nn.Parameter or set(module._parameters) != {"weight", "bias"}:
        return False
    if module._buffers or module._modules:
        return False
    return type(module).forward is nn.Linear.forward or _agrees(module)


@torch.no_grad()
def _agrees(module: nn.Linear) -> bool:
    """Whether the forward of `module`, given a small weight in fp64, computes what nn.Linear does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    x, weight, bias = random(2, 4, _IN), random(_OUT, _IN), None if module.bias is None else random(_OUT)
    wanted = F.linear(x, weight, bias)
    try:
        tried = copy.copy(module)
        tried.in_features, tried.out_features = _IN, _OUT
        held = {"weight": weight, "bias": bias}
        tried._parameters = {key: t if t is None else nn.Parameter(t) for key, t in held.items()}
        outputs = [tried.train(training).forward(x.clone()) for training in (False, True)]
    except Exception:  # whatever other shapes and values make of its code
        return False
    return all(
        isinstance(y, Tensor)
        and y.dtype == x.dtype
        and y.shape == wanted.shape
        and torch.allclose(y, wanted, 1e-12, 1e-12)
        for y in outputs
    )
