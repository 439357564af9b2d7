"""The merged weights of a live model, wherever it lies: for an engine that generates while it is trained."""

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from dora_dist.adapters.peft_format import plain_name
from dora_dist.dora.experts import ExpertsForward
from dora_dist.dora.inject import injection_of
from dora_dist.dora.merged import merged_weight, whole_tensor
from dora_dist.dora.norm_cache import find_shards, refresh_norms
from dora_dist.models.files import Weights
from dora_dist.models.merge_weights import base_entries
from dora_dist.models.origins import published_origins
from dora_dist.models.weights import packed_layers
from dora_dist.parallel.shards import Shards


def iter_merged_weights(model: nn.Module, changed_only: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of an injected model merged, for an inference engine's `load_weights`: one weight at a time,
    the same on every rank, from shards and from 4 bits. The model stays as it is.

    Names and shapes are those that transformers saves the model with, which are the base checkpoint's: one tensor
    for each expert where that has one for each. Tensors have the base's dtype, or what 4 bits stand for; some are
    views of the last one's memory. A tied weight of which one name is adapted comes under each name.

    Memory: one weight, dense, and what the caller keeps. Every rank iterates to the end, between steps.

    Args:
        changed_only: leave out what is as in the checkpoint; adapted weights, modules trained in full and 4-bit
            weights come in any case.

    Raises:
        UserError: the model was not injected, or is a wrapper around one that was.
    """
    injection_of(model)
    return _iterate(model, changed_only)


def _iterate(model: nn.Module, changed_only: bool) -> Iterator[tuple[str, Tensor]]:
    shards = find_shards(model)
    refresh_norms(model, shards)
    weights = LiveWeights(model, shards)
    for name in weights.names(changed_only):
        yield name, weights.whole(name).contiguous()


class LiveWeights(Weights):
    """A model's merged tensors, to be read as weight files are, by the names that they have in a checkpoint. Holds
    the model's weight that was merged last: several tensors may be parts of it."""

    def __init__(self, model: nn.Module, shards: Shards):
        entries, _ = base_entries(model, (), shards)
        super().__init__({entry.name: entry.shape for entry in entries})
        own = {plain_name(name): traced for name, traced in self.origins.items()}
        for name, module in model.named_modules():
            for key in module.layout.shapes if isinstance(module, ExpertsForward) else ():
                path = f"{plain_name(name)}.{key}"
                own[path] = module.layout.unstacked(own.pop(f"{path}.weight"))
        self._take(published_origins(model, own))
        self._shards, self._packed = shards, packed_layers(model)
        self._entries = {entry.name: entry for entry in entries}
        self._parted = Counter(entry.parameter for entry in entries)  # tied ones that are so no more stand twice
        self._last: tuple[str, Tensor] | None = None

    def names(self, changed_only: bool) -> list[str]:
        """The tensors in the order of the model's, so that each of these is made once."""
        place = {name: number for number, name in enumerate(self._entries)}
        sources = {name: {box.source for box in traced.boxes} for name, traced in self.origins.items()}
        wanted = [n for n, made_of in sources.items() if not changed_only or any(map(self._changed, made_of))]
        return sorted(wanted, key=lambda name: min(place[source] for source in sources[name]))

    def _changed(self, source: str) -> bool:
        entry = self._entries[source]
        trained = entry.layer is not None or entry.parameter.requires_grad
        return trained or entry.layout is not None or self._parted[entry.parameter] > 1

    def mapped(self, source: str) -> Tensor:
        if self._last is None or self._last[0] != source:
            self._last = None  # frees it
            self._last = source, self._merged(source)
        return self._last[1]

    def _merged(self, source: str) -> Tensor:
        entry = self._entries[source]
        if entry.layer is not None:
            return merged_weight(entry.layer, self._shards)
        return whole_tensor(entry.parameter, self._packed.get(entry.parameter), entry.dtype, self._shards)
