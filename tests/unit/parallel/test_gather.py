"""Tensors in pieces on two ranks, which are stood for one after the other."""

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.errors import UserError
from dora_dist.parallel.gather import ShardedTensor, Stacked, gathered, spread
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, Whole, as_matrix, flat_rectangles, write_whole

CPU = torch.device("cpu")


def test_parts_make_the_whole_and_copies_count_once():
    rows, copy = torch.randn(5, 3), torch.randn(4).bfloat16()
    own = [Rectangle(rows[:3]), Rectangle(rows[3:], row=3)]
    ranks = [
        [
            ShardedTensor("rows", torch.float32, (5, 3), [part], owned=True),
            ShardedTensor("copy", torch.bfloat16, (4,), [Rectangle(as_matrix(copy))], owned=rank == 0),
        ]
        for rank, part in enumerate(own)
    ]
    sent: list[torch.Tensor] = []
    list(gathered(ranks[1], lambda flat: sent.append(flat.clone()), CPU))
    got = list(gathered(ranks[0], lambda flat: flat.add_(sent.pop()), CPU))
    assert torch.equal(got[0], rows) and torch.equal(got[1], copy)


def test_a_tensor_whose_lines_lie_apart_is_gathered_and_written():
    whole = torch.randn(5, 3, 2, 4)
    apart = whole.to(memory_format=torch.channels_last)
    shards = Whole()
    tensor = ShardedTensor("convolution", whole.dtype, tuple(whole.shape), shards.rectangles(apart), owned=True)
    (got,) = gathered([tensor], shards.sum_, CPU)
    assert not apart.is_contiguous() and torch.equal(got, whole)
    write_whole(apart, -whole, shards)
    assert torch.equal(apart, -whole)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_stacked_matrices_lie_in_a_file_by_their_axes(order, tmp_path):
    """Three matrices [4, 5] on two ranks whose border is inside the second, and inside a row."""
    here = torch.randn(12, 5)
    stacked, flat = Stacked(3, order), here.flatten()

    def pieces(values, start):
        own = flat_rectangles(values, start, here.shape)
        return [ShardedTensor("x", here.dtype, tuple(here.shape), own, owned=True, stacked=stacked)]

    sent: list[torch.Tensor] = []
    list(gathered(pieces(flat[33:], 33), lambda bytes_: sent.append(bytes_.clone()), CPU))
    (stored,) = gathered(pieces(flat[:33], 0), lambda bytes_: bytes_.add_(sent.pop()), CPU)
    axes = here.view(3, 4, 5)
    for number, row, column in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).tolist():
        sizes, at = [axes.shape[a] for a in order], [(number, row, column)[a] for a in order]
        place = (at[0] * sizes[1] + at[1], at[2]) if order[0] == 0 else (at[0], at[1] * sizes[2] + at[2])
        assert stored[place] == axes[number, row, column]
    assert stored.shape == stacked.file_shape(here.shape)
    save_file({"x": stored.contiguous()}, tmp_path / "a.safetensors")
    for start, stop in ((0, 33), (33, 60)):
        own = torch.zeros(stop - start)
        spread(tmp_path / "a.safetensors", pieces(own, start), Processes())
        assert torch.equal(own, flat[start:stop])


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3)}, path)

    def read(name="a", dtype=torch.float32, shape=(2, 3)):
        part = torch.zeros(1, 2, dtype=dtype)
        spread(path, [ShardedTensor(name, dtype, shape, [Rectangle(part, row=1, col=1)], owned=True)], Processes())
        return part.tolist()

    assert read() == [[4.0, 5.0]]
    for fields, message in (
        ({"name": "b"}, "holds no 'b', which this run trains"),
        ({"dtype": torch.bfloat16}, r"'a' is F32 \[2, 3\], this run's is BF16 \[2, 3\]"),
        ({"shape": (3, 2)}, r"'a' is F32 \[2, 3\], this run's is F32 \[3, 2\]"),
    ):
        with pytest.raises(UserError, match=message):
            read(**fields)
