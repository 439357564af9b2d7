"""Put the linear layers of a model into 4 bits, adapted or not."""

from typing import Any

from torch import nn

from dora_dist.config import QuantConfig
from dora_dist.errors import UserError, nearest
from dora_dist.inject import injection_of, inside, is_linear, matches, set_module
from dora_dist.layers import DoraLinear, PackedLinear
from dora_dist.quant import Nf4


def pack_linears(model: nn.Module, config: QuantConfig, split: int = 1) -> None:
    """Hold the weights of all linear layers of an injected model in 4 bits, but for `config.skip` and the modules
    trained in full. `split`: ranks among which flat memory will be divided (ZeRO-3); rows are filled up to it.

    Raises:
        UserError: a name of `skip` matches nothing, or a layer's weight is tied to another module's.
    """
    saved = injection_of(model).saved
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DoraLinear) or is_linear(module)
    }
    for pattern in config.skip:
        if pattern != "lm_head" and not any(matches(name, [pattern]) for name in linears):
            raise UserError(f"quant.skip: {pattern!r} matches no linear layer; {nearest(pattern, linears)}")
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    for name, module in linears.items():
        if matches(name, config.skip) or inside(name, saved):
            continue
        weight: Any = module.weight
        if len(owners[weight]) > 1:
            raise UserError(f"quant.skip: {name!r} is tied to another module; name it here to keep it in 16 bits")
        _pack(model, name, module, weight, config, split)


def _pack(
    model: nn.Module, name: str, module: nn.Module, weight: nn.Parameter, config: QuantConfig, split: int
) -> None:
    rows, columns = weight.shape
    layout = Nf4(rows, columns, weight.dtype, config.block_size, config.double_quant, -(-rows // split) * split)
    if isinstance(module, DoraLinear):
        module.pack(layout)
    else:
        bias: Any = module.bias
        set_module(model, name, PackedLinear(weight, bias, layout, transposed=not isinstance(module, nn.Linear)))
