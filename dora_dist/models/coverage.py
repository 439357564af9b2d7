"""Which share of a base's weights is adapted, and which large part of it is not: told before anything is read."""

from collections.abc import Collection

from torch import nn

from dora_dist.dora.experts_layout import experts_layout
from dora_dist.dora.inject import injection_of
from dora_dist.dora.layers import DoraLayer
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.dora.targets import inside, is_target_kind, output_heads
from dora_dist.models.participation import summary
from dora_dist.quant.modules import FrozenExperts

_LARGE = 0.1  # of the base's weights


def coverage(model: nn.Module, idle: Collection[str]) -> list[str]:
    """Lines about an injected model whose other layers are as they were. `idle` takes no part in the loss."""
    injection = injection_of(model)
    adapters = {p for layer in dora_layers(model).values() for p in (layer.lora_A, layer.lora_B, layer.magnitude)}
    total = sum(p.numel() for p in model.parameters() if p not in adapters)
    adapted = {layer.weight for layer in dora_layers(model).values()}
    in_full = {p for name in injection.saved for p in model.get_submodule(name).parameters()}
    shares = [sum(p.numel() for p in held) / total for held in (adapted, in_full)]
    told = f", {_percent(shares[1])} trained in full" if in_full else ""
    lines = [f"adapted: {_percent(shares[0])} of the base's weights{told}"]
    for names, reason in (
        (injection.left_out, "they take no part in the loss of text"),
        (injection.too_small, "a side is smaller than the rank"),
        (injection.halved, "gate_proj and up_proj are one matrix there, and only one of them is named"),
    ):
        if names:
            lines.append(f"left out, as {reason}: {summary(names)}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        lines.append("warning: config.json asks for the router's own loss (output_router_logits); it is left out")
    return [*lines, *_warnings(_frozen_kinds(model, idle), total)]


def _frozen_kinds(model: nn.Module, idle: Collection[str]) -> dict[str, list[nn.Module]]:
    """The modules that hold frozen weights of their own, by the last word of their names, but for embeddings, the
    output's head and what is `idle`."""
    heads, apart = output_heads(model), [*injection_of(model).saved, *idle]
    kinds: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None or inside(name, apart):
            continue
        if module not in heads and not isinstance(module, DoraLayer | nn.Embedding):
            words = [word for word in name.split(".") if not word.isdigit()]
            kind = words[-2:] if isinstance(module, FrozenExperts) else words[-1:]
            kinds.setdefault(".".join(kind) or name, []).append(module)
    return kinds


def _warnings(kinds: dict[str, list[nn.Module]], total: int) -> list[str]:
    lines, told, to_name = [], [], []
    for kind, modules in kinds.items():
        share = sum(p.numel() for m in modules for p in m.parameters(recurse=False)) / total
        if share <= _LARGE:
            continue
        if all(_can_be_adapted(m) for m in modules):
            told.append(f"{kind} ({_percent(share)})")
            to_name.append(kind)
        else:
            cls = type(next(m for m in modules if not _can_be_adapted(m))).__name__
            lines.append(
                f"warning: {kind} ({cls}) holds {_percent(share)} of the base's weights and is not adapted: DoRA "
                "has no layer for it"
            )
    if told:
        lines.append(
            f"warning: not adapted, of the base's weights: {', '.join(told)}; to adapt them too, add "
            f"{', '.join(to_name)} to dora.targets"
        )
    return lines


def _can_be_adapted(module: nn.Module) -> bool:
    return is_target_kind(module) or isinstance(module, FrozenExperts) or experts_layout(module) is not None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
