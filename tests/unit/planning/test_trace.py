"""The tracer counts what code on fake tensors holds, computes and sends: against hand counts, and real memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_dist.parallel.phases import Phase
from dora_dist.planning.stand_ins import replaced
from dora_dist.planning.trace import GATHERED, HOST, Collective, Tracer

MB = 1 << 20


def traced(**options):
    return Tracer(lambda func, args, kwargs: None, **options)


def test_what_is_held_at_the_fullest_by_phase():
    with FakeTensorMode(), traced() as tracer:
        tracer.enter(Phase.FORWARD, "a")
        kept = torch.empty(MB)  # 4 MB
        for size in (MB, 2 * MB, MB):  # each freed before the next, and the fullest moment in the middle
            del_me = torch.empty(size)
            del del_me
        tracer.enter(Phase.BACKWARD, "b")
        other = kept.view(-1, 2).t() * 2  # views hold nothing, a product does
        del kept
    assert tracer.peaks[Phase.FORWARD, False] == {"a": 12 * MB}
    assert tracer.peaks[Phase.BACKWARD, False] == {"a": 4 * MB, "b": 4 * MB}
    assert +tracer.live == {"b": other.nbytes}


def test_host_memory_is_apart_and_pinned_blocks_round_up():
    rounded = {HOST + "x": lambda size: 1 << (size - 1).bit_length()}
    with FakeTensorMode(), traced(rounded=lambda tag, size: rounded.get(tag, lambda s: s)(size)) as tracer:
        tracer.enter(Phase.FORWARD, HOST + "x")
        away = torch.empty(3, MB, dtype=torch.uint8)
        with tracer.held_for("here"):
            near = torch.empty(5)
    assert tracer.peaks[Phase.FORWARD, True] == {HOST + "x": 4 * MB}
    assert tracer.peaks[Phase.FORWARD, False] == {"here": 20}
    assert away.numel() + near.numel()


def test_bytes_that_lie_in_host_memory_are_told():
    with FakeTensorMode(), traced() as tracer:
        tracer.enter(Phase.FORWARD, HOST + "x")
        away = torch.ones(3)
        with tracer.held_for("here"):
            near = away * 2
            near + near
    assert [call.host_bytes for call in tracer.calls] == [12, 12, 0]


def test_storages_that_are_resized_are_followed():
    tracer = traced()
    with replaced(torch.UntypedStorage, "resize_", tracer.following), FakeTensorMode(), tracer:
        tracer.enter(Phase.FORWARD, "w")
        t = torch.empty(MB)
        t.untyped_storage().resize_(0)
        assert tracer.live["w"] + tracer.live[GATHERED] == 0
        t.untyped_storage().resize_(8 * MB)
    assert tracer.live[GATHERED] == 8 * MB and tracer.peaks[Phase.FORWARD, False] == {GATHERED: 8 * MB}


def test_kernels_are_counted_and_views_are_not():
    with FakeTensorMode(), traced() as tracer:
        tracer.enter(Phase.FORWARD, "w")
        a, b = torch.empty(3, 5), torch.empty(5, 7)
        c = a @ b
        c.add_(1)
        c.t().reshape(-1)[:4]
        d = b.t()
    assert d.shape == (7, 5)
    product, addition, copy = tracer.calls
    assert product.flops == 2 * 3 * 5 * 7 and product.bytes == 4 * (15 + 35 + 21)
    assert product.writes == addition.reads == addition.writes
    assert addition.name == "add_" and copy.name == "clone"


def test_the_host_is_told_that_every_token_is_learned_and_nothing_is_infinite():
    with FakeTensorMode(), traced():
        targets = torch.empty(2, 3, dtype=torch.long)
        assert (targets != -100).nonzero().shape == (6, 2)
        assert torch.empty(()).item() == 1 and bool(torch.isfinite(torch.empty(())))
    with traced():  # real tensors keep their values
        assert torch.tensor([0, 7]).nonzero().tolist() == [[1]] and torch.tensor(5).item() == 5


@pytest.mark.parametrize(("blocks", "most"), [(True, 5 * MB), (False, 6 * MB)])
def test_scratch_of_collectives(blocks, most):
    """Of one that the host does not wait for, until the next has begun."""

    def collective_of(func, args, kwargs):
        return Collective("all_gather", MB, 2, 1, blocks) if func._opname == "sin_" else None

    with FakeTensorMode(), Tracer(collective_of, scratch_of=lambda c: c.bytes) as tracer:
        tracer.enter(Phase.FORWARD, "w")
        t = torch.empty(MB)
        t.sin_()
        t.sin_()
    assert sum(tracer.peaks[Phase.FORWARD, False].values()) == most
    assert all(call.collective is not None for call in tracer.calls)


@pytest.mark.parametrize("dtypes", [["float32"] * 3, ["float32", "float64", "float32"]])
def test_parts_of_many_ranks_make_what_torch_makes_of_them(dtypes):
    with FakeTensorMode(), traced() as tracer:
        parts = [torch.empty(4 + n, dtype=getattr(torch, dtype))[1:] for n, dtype in enumerate(dtypes)]
        whole = torch.cat(parts)
    assert (whole.shape, whole.stride(), whole.dtype) == ((12,), (1,), getattr(torch, max(dtypes)))
    (call,) = tracer.calls
    assert (call.name, len(call.reads), call.bytes) == (
        "cat",
        3,
        12 * whole.itemsize + sum(p.nbytes for p in parts),
    )
