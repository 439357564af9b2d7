"""What rounding may do: bounds that hold on every machine and still show a fault.

A sum of n terms errs by at most n u times the terms' absolute sum, u being the dtype's unit round-off, in whatever
order it is taken; round-offs of either sign make about sqrt(n) u of it. Order is all in which instruction sets,
thread counts and BLAS libraries differ. So an error is held against sqrt(n) u, with a margin, and of two things:
the norm of the whole tensor (`assert_near`), or each element's own terms (`assert_sums`), where one wrong element
among many must show. Never against the element itself, which may be all but cancelled.
"""

import torch

MARGIN = 8
# Of the tiny models' logits and gradients: two blocks there and back, products of up to 96 terms, norms, softmax.
MODEL = 1000
# Relative, of losses and weights after some steps of the same training done another way. A step rounds to about
# 1e-7, which AdamW magnifies where a gradient is all but zero; stale norms or other tokens' means show above 1e-4.
TRAINED = 1e-5


def rounding(terms: int, dtype: torch.dtype) -> float:
    """The relative error that a sum of so many terms may have; products after each other add their terms."""
    return MARGIN * terms**0.5 * torch.finfo(dtype).eps / 2


def assert_near(
    got: torch.Tensor, want: torch.Tensor, terms: int, dtype: torch.dtype | None = None, about: str = ""
) -> None:
    """The error's norm is at most what rounding to `dtype`, the narrower of the two's, makes of `want`'s."""
    dtype = dtype or min(got.dtype, want.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    assert got.shape == want.shape, f"{about}: {tuple(got.shape)} is not {tuple(want.shape)}"
    error, allowed = (got.double() - want.double()).norm(), rounding(terms, dtype) * want.double().norm()
    assert error <= allowed, f"{about}: off by {error:.2e}, where rounding makes {allowed:.2e}"


def assert_sums(
    got: torch.Tensor, want: torch.Tensor, of: torch.Tensor, terms: int, dtype: torch.dtype | None = None
) -> None:
    """Each element is off by at most what rounding makes of `of`, the sum of its terms' absolute values, where
    sums are taken in `dtype` (`got`'s), and by one rounding to a narrower dtype of `got`."""
    assert got.shape == want.shape == of.shape
    allowed = rounding(terms, dtype or got.dtype) * of.double()
    if dtype is not None and dtype != got.dtype:
        narrow = torch.finfo(got.dtype)
        allowed += 1.01 * narrow.eps / 2 * want.abs() + narrow.smallest_normal * narrow.eps
    errors = (got.double() - want.double()).abs()
    assert (errors <= allowed).all(), f"off by {(errors - allowed).max():.2e} more than rounding makes"


def roundings(count: int, dtype: torch.dtype) -> float:
    """The relative error of a value that was rounded to `dtype` so many times on its way, at the most."""
    return count * torch.finfo(dtype).eps / 2
