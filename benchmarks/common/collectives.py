"""The one counter of collectives: a dispatch mode, which sees all that go through torch's dispatcher, whether
FSDP2, DDP's reducer (in C++), DeepSpeed or we ask for them."""

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.planning.fake_group import collective_of

Counts = dict[str, dict[str, int]]  # collective -> {"count", "bytes"}


class Counter(TorchDispatchMode):
    """Collectives by purpose, and the bytes of each one's whole vector: what an all-gather has gathered, what a
    reduce-scatter or an all-reduce sums (of which a reduce-scatter leaves each rank a part)."""

    def __init__(self, purpose: Callable[[str], str] = lambda collective: ""):
        """`purpose`: what a collective of that name, sent just now, is for."""
        super().__init__()
        self.purpose = purpose
        self.counts: dict[str, Counts] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as operations on local tensors
        found = collective_of(func, args, kwargs or {})
        if found is not None:
            rows = self.counts.setdefault(self.purpose(found.kind), {})
            row = rows.setdefault(found.kind, {"count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += found.bytes
        return func(*args, **(kwargs or {}))

    def by_collective(self) -> Counts:
        totals: Counts = {}
        for rows in self.counts.values():
            for collective, row in rows.items():
                total = totals.setdefault(collective, {"count": 0, "bytes": 0})
                for key, value in row.items():
                    total[key] += value
        return totals

    def received(self, ranks: int) -> float:
        """Bytes that come to one of `ranks` in rings: of an all-reduce twice what the others hold."""
        totals = self.by_collective().items()
        return sum((2 if kind == "all_reduce" else 1) * row["bytes"] for kind, row in totals) * (1 - 1 / ranks)
