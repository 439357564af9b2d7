"""Put the linear layers and the experts of a model into 4 bits, adapted or not."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dora_dist.config import QuantConfig
from dora_dist.dora.experts import DoraExperts, complete
from dora_dist.dora.inject import injection_of, set_module
from dora_dist.dora.layers import DoraLinear
from dora_dist.dora.targets import Projection, inside, is_linear, matches, with_projections
from dora_dist.errors import UserError, nearest
from dora_dist.quant.modules import BaseWeight, FrozenExperts, PackedLinear
from dora_dist.quant.nf4 import Nf4

_WEIGHT_READERS = ("dt_proj",)  # Mamba multiplies by its weight
_LEAST_BLOCK = 32


def pack_linears(
    model: nn.Module, config: QuantConfig, split: int = 1, stored: Mapping[str, int] | None = None
) -> None:
    """Hold the weights of all linear layers and experts of a model, injected or not, in 4 bits, but for
    `config.skip` and the modules trained in full. `split`: ranks among which flat memory will be divided (ZeRO-3);
    rows are filled up to it.

    `stored`: weights that the checkpoint holds in 4 bits already -> their block size. These keep it, and their
    scales in fp32 whatever `config.double_quant` says: coding them anew would change the weights. What such a
    checkpoint left in 16 bits stays so.

    Raises:
        UserError: a name of `skip` matches nothing, a layer's weight is tied to another module's, or one of
            `stored` is not to be held in 4 bits.
    """
    linears: dict[str, nn.Module | Projection] = {
        name: module
        for name, module in with_projections(model).items()
        if isinstance(module, DoraLinear | DoraExperts | FrozenExperts) or is_linear(module)
    }
    _check_skip(config.skip, linears)
    owners, stored = _owners(model), dict(stored or {})
    made: dict[nn.Module, nn.Module] = {}
    for name in _to_pack(model, linears, config, {key.removesuffix(".weight") for key in stored}):
        found = linears[name]
        if isinstance(found, Projection):
            assert found.layout is not None
            complete(found.experts, found.layout)
        module = model.get_submodule(name)
        if module in made:  # used under another name, too
            set_module(model, name, made[module])
            continue
        weight: Any = module.weight
        if len(owners.get(weight, ())) > 1:
            raise UserError(f"quant.skip: {name!r} is tied to another module; name it here to keep it in 16 bits")
        block_size = stored.pop(f"{name}.weight", None)
        if block_size and _transposed(module):
            raise UserError(
                f"model.path: {name!r} is a Conv1D, which bitsandbytes stores transposed; use a 16-bit checkpoint"
            )
        made[module] = _packed(module, weight, _as_stored(config, block_size) if block_size else config, split)
        set_module(model, name, made[module])
    for name in stored:
        raise UserError(
            f"model.path: {name!r} is in 4 bits in the checkpoint, so it must be the weight of a linear layer of "
            "the model that neither quant.skip nor dora.modules_to_save names"
        )


def _check_skip(skip: Sequence[str], linears: Mapping[str, object]) -> None:
    """Raises UserError: a name matches nothing."""
    for pattern in skip:
        if pattern != "lm_head" and not any(matches(name, [pattern]) for name in linears):
            raise UserError(f"quant.skip: {pattern!r} matches no linear layer; {nearest(pattern, linears)}")


def _owners(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """The modules that hold each parameter: several where it is tied."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return owners


def _to_pack(
    model: nn.Module, linears: Mapping[str, nn.Module | Projection], config: QuantConfig, stored: Collection[str]
) -> list[str]:
    """The names of the layers to hold in 4 bits. `stored`: those that the checkpoint holds so, if any."""
    saved = injection_of(model).saved if hasattr(model, "dora") else ()
    read, dtype = _read_by_the_model(model), getattr(getattr(model, "config", None), "dtype", None)

    def fits(name: str) -> bool:
        # PEFT takes modules for ones trained in full by their last letters, and wants them in the adapter.
        if matches(name, config.skip) or inside(name, saved) or name.endswith(tuple(saved)):
            return False
        if (stored and name not in stored) or read & set(name.split(".")):
            return False
        weight: Any = linears[name].weight
        # What stays in fp32 inside a model of 16 bits is not for 4.
        return dtype is None or weight.dtype.itemsize <= dtype.itemsize

    return [name for name in linears if fits(name)]


def _read_by_the_model(model: nn.Module) -> set[str]:
    """Parts of names of the layers whose weight the model's own code reads beside their forward."""
    names = set(_WEIGHT_READERS)
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):  # T5 asks for the dtype of `wo`
        names |= set(getattr(model, attribute, None) or ())
    return names


def _as_stored(config: QuantConfig, block_size: int) -> QuantConfig:
    return replace(config, block_size=block_size, double_quant=False)


def _packed(module: nn.Module, weight: nn.Parameter, config: QuantConfig, split: int) -> nn.Module:
    rows, columns = weight.shape
    block_size = min(config.block_size, max(_LEAST_BLOCK, 1 << (columns - 1).bit_length()))
    layout = Nf4(rows, columns, weight.dtype, block_size, config.double_quant, -(-rows // split) * split)
    if isinstance(module, BaseWeight):
        module.pack(layout)
        return module
    bias: Any = module.bias
    return PackedLinear(weight, bias, layout, _transposed(module))


def _transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D, adapted or not."""
    return module.transposed if isinstance(module, BaseWeight) else not isinstance(module, nn.Linear)
