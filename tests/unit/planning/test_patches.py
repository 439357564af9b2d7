"""What a rehearsal replaces is there and is called, or the rehearsal fails."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dora_dist.planning import fake_group, stand_ins
from dora_dist.planning.trace import Tracer
from dora_dist.quant import modules


def test_what_is_replaced_is_called_and_put_back():
    owner = SimpleNamespace(half=lambda n: n / 2)
    before = owner.half
    around = stand_ins.replaced(owner, "half", lambda half: lambda n: half(n) + 1, needed=True)
    with around:
        assert owner.half(4) == 3.0
    assert owner.half is before


def test_what_is_replaced_in_vain_fails_loudly():
    owner = SimpleNamespace(half=lambda n: n / 2)
    with (
        pytest.raises(LookupError, match="half was replaced in a rehearsal, and nothing called it"),
        stand_ins.replaced(owner, "half", lambda half: half, needed=True),
    ):
        pass


def replace_all(strategy="single"):
    with stand_ins.replacements(nn.Linear(1, 1), strategy, Tracer(lambda *_: None)) as names:
        return names


def test_all_that_a_rehearsal_replaces_is_there():
    names = replace_all()
    assert "dora_dist.quant.modules.pieces" in names
    assert "ShardingPropagator._propagate_tensor_meta_non_cached" in names
    assert {"torch.nn.functional.scaled_dot_product_attention", "UntypedStorage.resize_", "Linear.to"} <= set(
        names
    )


def test_a_target_that_was_renamed_fails_loudly(monkeypatch):
    monkeypatch.setattr(stand_ins, "_PIECES", ((modules, "_chunks"),))
    with pytest.raises(LookupError, match=r"modules\._chunks is to be replaced in a rehearsal, and is not there"):
        replace_all()
    monkeypatch.setattr(stand_ins, "_PIECES", ())
    monkeypatch.setattr(fake_group, "_EVERY_RANK_ALIKE", {"is_bad_grad_norm": lambda norm: False})
    with pytest.raises(LookupError, match="is_bad_grad_norm of DeepSpeed is to be replaced"):
        replace_all("zero3")


def test_a_collective_that_is_not_known_fails_loudly():
    known = torch.ops.c10d.allreduce_.default
    assert fake_group.collective_of(torch.ops.aten.add.Tensor, (), {}) is None
    assert fake_group.collective_of(torch.ops.c10d.barrier.default, (), {}) is None
    other = SimpleNamespace(namespace="c10d", _opname="allreduce_in_pieces_", _schema=known._schema)
    with pytest.raises(LookupError, match=r"cannot count what c10d\.allreduce_in_pieces_ sends"):
        fake_group.collective_of(other, (), {})
