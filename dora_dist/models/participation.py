"""Which layers take part in the loss of a row of text, found before any weight is read: a forward of the meta
model on fake tensors, with a factor on the output of each layer that could be adapted.

A layer whose factor no gradient of the output reaches would be trained in vain: the towers for images and sound of
a model that is given text alone, and layers whose weight the model's code reads without calling them, which passes
the adapter by. Of many equal blocks one is tried.

Where the model's code asks for values, which fake tensors lack, the run's first forward tells (`refuse_idle`).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from dora_dist.dora.inject import injection_of
from dora_dist.dora.targets import Projection, inside, is_target_kind, matches, with_projections
from dora_dist.errors import UserError
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import outermost_lists

_TOKENS = 8  # of the row
_NAMED = 4  # kinds of modules that a line names


def idle_modules(model: nn.Module, saved: Iterable[str] = ()) -> frozenset[str] | None:
    """The names of the layers that could be adapted, and of what is in the modules that the patterns `saved` mean,
    which take no part in the loss of text. None: unknown, as the model's code asks for values, which fake tensors
    lack."""
    with _one_of_equal_blocks(model) as tried_as:
        tried = _idle(model, list(saved))
    if tried is None:  # its code may count its blocks
        tried, tried_as = _idle(model, list(saved)), {}
    if tried is None:
        return None
    elsewhere = (name for name in tried if not name.startswith(tuple(tried_as.values())))
    in_blocks = (
        block + name.removeprefix(stand_in)
        for block, stand_in in tried_as.items()
        for name in tried
        if name.startswith(stand_in)
    )
    return frozenset([*elsewhere, *in_blocks])


def _idle(model: nn.Module, saved: list[str]) -> set[str] | None:
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    roots = [name for name in modules if matches(name, saved)]
    in_full = [name for name in modules if inside(name, roots)]
    adaptable = {name: m for name, m in with_projections(model).items() if is_target_kind(m)}
    with FakeTensorMode(allow_non_fake_inputs=True), _experts_at_once(model):
        named = dict(model.named_parameters(remove_duplicate=False))
        fake = {p: torch.empty_like(p, device="cpu") for p in named.values()}  # tied ones stay tied
        tensors = {name: fake[p] for name, p in named.items()}
        trained = {name: [t for key, t in tensors.items() if key.startswith(f"{name}.")] for name in in_full}
        for tensor in (t for own in trained.values() for t in own):
            tensor.requires_grad_()
        factors = {m: torch.ones((), requires_grad=True) for m in adaptable.values()}
        hooks = [m.register_forward_hook(_times(f)) for m, f in factors.items() if isinstance(m, nn.Module)]
        try:
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            with torch.enable_grad():
                for name, place in adaptable.items():
                    if isinstance(place, Projection):
                        tensors[name] = tensors[name] * factors[place].to(tensors[name].dtype)
                logits = functional_call(model, tensors, kwargs={"input_ids": ids}).logits
        except Exception:  # whatever a model's code makes of tensors without values
            return None
        finally:
            for hook in hooks:
                hook.remove()
    reached = _leaves(logits)
    idle = {name for name, place in adaptable.items() if id(factors[place]) not in reached}
    # What is trained in full needs no call: to read its weight is enough.
    in_vain = {n for n, own in trained.items() if (own or n in roots) and reached.isdisjoint(map(id, own))}
    return idle.difference(in_full) | in_vain


def refuse_idle(model: nn.Module, loss: Callable[[], Tensor], processes: Processes) -> None:
    """UserError, on every rank: no gradient of `loss()`, a forward of the run's model on rows of its data, reaches
    some trained module. All ranks call this; no gradient is made, and no random number is used up."""
    names, reached = _reached(model, loss, processes.device)
    anywhere = processes.agree([int(flag) for flag in reached])()
    idle = [name for name, flag in zip(names, anywhere, strict=True) if not flag]
    if not idle:
        return
    layers = injection_of(model).layers
    adapted = [name for name in idle if name in layers]
    key = "dora.targets" if adapted else "dora.modules_to_save"
    hint = _others([name for name in layers if name not in idle], idle) if adapted else ""
    told = summary(adapted or idle)
    raise UserError(f"{key}: no gradient of the loss of text reaches {told}; name other modules{hint}")


def _reached(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> tuple[list[str], list[bool]]:
    """The modules that have trained parameters of their own, and whether a gradient of `loss()` reaches one."""
    held: dict[str, set[int]] = {}
    hooks = []
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            held[name] = {id(p) for p in module.parameters(recurse=False)}
            # FSDP2 has others in their place while the module computes.
            hooks.append(module.register_forward_pre_hook(_note(held[name])))
    try:
        devices = [device] if device.type == "cuda" else []
        # Compiled graphs do not tell which of a block's parameters they use, and would be made anew without hooks.
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            total = loss()
    finally:
        for hook in hooks:
            hook.remove()
    leaves = _leaves(total)
    return list(held), [not leaves.isdisjoint(ids) for ids in held.values()]


def _note(ids: set[int]) -> Callable[..., None]:
    def hook(module: nn.Module, _: object) -> None:
        ids.update(id(p) for p in module.parameters(recurse=False))

    return hook


def summary(names: Iterable[str]) -> str:
    """A few of many names, with the numbers of blocks left open."""
    alike = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in alike.items()]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + more


def _others(good: list[str], idle: Collection[str]) -> str:
    """A hint: a glob that means modules of `good` and none of `idle`, where there is a plain one."""
    common = os.path.commonprefix(good).rpartition(".")[0]  # noqa: RUF071 - of names
    if not common or any(name.startswith(f"{common}.") for name in idle):
        return ""
    return f", such as {f'{common}.*'!r}"


def _leaves(output: Tensor) -> set[int]:
    """The ids of the leaves that a gradient of `output` reaches. A backward would start autograd's threads, and
    rehearsals are forked from this process."""
    seen: set[object] = set()
    leaves: set[int] = set()
    ahead = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.add(id(node.variable))  # type: ignore[attr-defined]
        ahead += [following for following, _ in node.next_functions]
    return leaves


def _times(factor: Tensor) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output * factor.to(output.dtype)

    return hook


@contextmanager
def _one_of_equal_blocks(model: nn.Module) -> Iterator[dict[str, str]]:
    """Inside, the outermost lists of blocks have one of each kind. Gives the prefix of every block's names, and of
    those of the block that stands for it."""
    names = {module: name for name, module in model.named_modules()}
    tried_as: dict[str, str] = {}
    whole = {blocks: blocks._modules for blocks in outermost_lists(model)}
    for blocks, modules in whole.items():
        first: dict[object, nn.Module] = {}
        for key, block in modules.items():
            kind = _kind(block)
            first.setdefault(kind, block)
            tried_as[f"{names[blocks]}.{key}."] = f"{names[blocks]}.{list(first).index(kind)}."
        blocks._modules = {str(number): block for number, block in enumerate(first.values())}
    try:
        yield tried_as
    finally:
        for blocks, modules in whole.items():
            blocks._modules = modules


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What equal blocks have in common: their modules, shapes and switches (such as which attention one has)."""
    shapes = ((name, tuple(p.shape)) for name, p in block.named_parameters())
    switches = (
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in (*vars(module).items(), ("", None))
        if isinstance(value, bool | str | None) and key != "training"
    )
    return (*shapes, *switches)


@contextmanager
def _experts_at_once(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' mixtures compute in the one way that asks for no values, in any dtype."""
    attribute = "_experts_implementation_internal"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), attribute)}
    before = {key: getattr(config, attribute) for key, config in configs.items()}
    for config in configs.values():
        setattr(config, attribute, "batched_mm")
    try:
        yield
    finally:
        for key, config in configs.items():
            setattr(config, attribute, before[key])
