"""How modules hold their experts: found from names and shapes of their parameters, and proved before it is used.
The class's own forward on a few random numbers must give what ours gives.
"""

import copy
import inspect
from dataclasses import replace

import torch
from torch import nn

from dora_dist.dora.experts import ExpertsForward, ExpertsLayout, complete

FIRST = ("gate_up_proj", "up_proj")
LAST = "down_proj"
_TINY = 3  # experts, and intermediate features, that a layout is proved with
_NEAR = 1e-4  # some models accumulate in fp32


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """How `module` holds its experts, adapted or not; None where it holds none, or in a way that is not known."""
    if isinstance(module, ExpertsForward):
        return module.layout
    layout = _layout(module)
    if layout is None:
        return None
    key = type(module), layout.transposed, _settings(module)
    if key not in _proved:
        _proved[key] = _agree(module, layout)
    return layout if _proved[key] else None


_proved: dict[tuple[type, bool, frozenset], bool] = {}


def _settings(module: nn.Module) -> frozenset:
    """What a class's forward may ask besides sizes: flags, bounds, which parameters and parts there are."""
    values = {
        (key, v) for key, v in vars(module).items() if isinstance(v, bool | float | str) and key != "training"
    }
    parts = {(key, type(part)) for held in (module._parameters, module._modules) for key, part in held.items()}
    return frozenset(values | parts)


def unknown_experts(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of experts that `module`, called `name`, holds in a way that is not known."""
    told = "expert" in f"{name} {type(module).__name__}".lower()
    found = {key: tuple(p.shape) for key, p in _stacks(module).items()} if told else {}
    return found if found and experts_layout(module) is None else {}


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}


def _layout(module: nn.Module) -> ExpertsLayout | None:
    """What the names and shapes of a module's parameters say."""
    held = _stacks(module)
    first = next((key for key in FIRST if key in held), None)
    if first is None or set(held) != {first, LAST}:
        return None
    takes = len(inspect.signature(inspect.unwrap(type(module).forward)).parameters) - 1
    (E, *a), (other, *b) = held[first].shape, held[LAST].shape
    gates = 2 if first == "gate_up_proj" else 1
    plain, transposed = a == [gates * b[1], b[0]], a == [b[1], gates * b[0]]
    if plain and transposed:  # without gates either is possible
        plain = not getattr(module, "is_transposed", False)
    if other != E or takes not in (1, 3) or not (plain or transposed):
        return None
    shapes = {key: tuple(held[key].shape[1:] if plain else held[key].shape[:0:-1]) for key in (first, LAST)}
    return ExpertsLayout(E, shapes, not plain, takes == 3)  # type: ignore[arg-type]


@torch.no_grad()
def _agree(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether the class's own forward gives what ours gives, of a few experts with random numbers in fp64."""
    numbers = torch.Generator().manual_seed(0)
    tiny = _tiny(module, layout, numbers)
    hidden = layout.shapes[LAST][0]
    x = torch.randn(2 * _TINY, hidden, dtype=torch.float64, device="cpu", generator=numbers)
    arguments = [x]
    if layout.routed:  # the one in the middle gets no token
        weights = torch.rand(len(x), 2, dtype=torch.float64, device="cpu", generator=numbers)
        arguments += [torch.tensor([[0, 2], [2, 0]], device="cpu").repeat(_TINY, 1), weights]
    try:
        expected = inspect.unwrap(type(module).forward)(tiny, *arguments)
        own = _layout(tiny)
        if own is None:
            return False
        complete(tiny, replace(own, transposed=layout.transposed))
        found = type(tiny).forward(tiny, *arguments)
    except Exception:  # whatever a forward of another kind does with these
        return False
    return bool((found - expected).norm() <= _NEAR * expected.norm())


def _tiny(module: nn.Module, layout: ExpertsLayout, numbers: torch.Generator) -> nn.Module:
    """A copy with few experts and few features inside, in fp64 on the host."""

    def random(*shape: int) -> nn.Parameter:
        values = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=numbers)
        return nn.Parameter(values / shape[-1] ** 0.5)

    tiny = copy.copy(module)
    hidden, gates = layout.shapes[LAST][0], 2 if "gate_up_proj" in layout.shapes else 1
    sizes = dict(zip(layout.shapes, ((gates * _TINY, hidden), (hidden, _TINY)), strict=True))
    tiny._parameters = {}
    for key, (out, columns) in sizes.items():
        tiny._parameters[key] = random(_TINY, *((columns, out) if layout.transposed else (out, columns)))
        if module._parameters.get(f"{key}_bias") is not None:
            tiny._parameters[f"{key}_bias"] = random(_TINY, out)
    tiny._modules = {key: copy.deepcopy(child) for key, child in module._modules.items() if child is not None}
    for child in tiny._modules.values():
        for inner in child.modules():  # type: ignore[union-attr]
            inner._parameters = {k: p if p is None else random(*p.shape) for k, p in inner._parameters.items()}
    for key in ("num_experts", "intermediate_size", "intermediate_dim", "expert_dim"):
        if hasattr(tiny, key):
            setattr(tiny, key, _TINY)
    return tiny
