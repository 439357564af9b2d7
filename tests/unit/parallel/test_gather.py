"""Tensors in pieces on two ranks, which are stood for one after the other."""

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.errors import UserError
from dora_dist.parallel.gather import ShardedTensor, gathered, spread
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Rectangle, Whole, as_matrix, write_whole

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
