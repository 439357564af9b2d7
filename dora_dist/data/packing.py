"""Several short rows in one sequence: which go together, and the mask that keeps them apart."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch


def pack(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: the longest rows first, each into the fullest pack that still takes
    it.

    Deterministic, never splits a row, O(n log n) (there are at most `seq_len` distinct gaps to search).

    Args:
        lengths: [rows] tokens of each row, at most `seq_len`.

    Returns:
        The row numbers of each pack; their lengths sum to at most `seq_len`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and int(lengths.max()) > seq_len:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit a pack of {seq_len}")
    packs: list[list[int]] = []
    by_gap: dict[int, list[int]] = {}  # free tokens -> packs with that many
    gaps: list[int] = []  # the keys of by_gap, ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(gaps, length)
        if place == len(gaps):
            gap, number = seq_len, len(packs)
            packs.append([])
        else:
            gap = gaps[place]
            number = by_gap[gap].pop()
            if not by_gap[gap]:
                del by_gap[gap], gaps[place]
        packs[number].append(row)
        if rest := gap - length:
            if rest not in by_gap:
                insort(gaps, rest)
            by_gap.setdefault(rest, []).append(number)
    return packs


def packed_attention(lengths_BD: torch.Tensor, T: int) -> torch.Tensor:
    """The block-diagonal causal mask of packed sequences, for models that cannot go by lengths (attention.py).

    Args:
        lengths_BD: [B, D] the lengths of the documents in each row of T, in order, then zeros.

    Returns:
        [B, 1, T, T] bool, True where the query (dim 2) may attend to the key (dim 3). Padding attends to
        padding: a row of the mask without any True makes the softmax NaN.
    """
    ends_BD = lengths_BD.cumsum(1)
    documents_BT = (torch.arange(T, device=lengths_BD.device)[:, None] >= ends_BD[:, None, :]).sum(-1)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril_()[:, None]


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True = may attend) as what is added to attention scores: 0, or the dtype's lowest value.

    For `attn_implementation="eager"`, which adds whatever 4D mask it is given: a bool one is silently wrong
    there.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
