"""What rounding does to a test on somebody else's processor.

Processors, their libraries and numbers of threads add in other orders and fuse other operations.
So tests compare

- bit by bit what the same operations make of the same numbers in the same shapes, and copies;
- other results in float64 where they can, within a bound of :func:`rounding`; across a network,
  within a tolerance that float32, whose rounding is 2^29 times as large, shows to be far above
  rounding (:func:`assert_far_above_rounding`);
- whole evaluations in float32, where the network is, within ``FLOAT32_NETWORK``;
- shares and means of random draws within a number of deviations. Generators on the host draw the
  same numbers on every processor (normal ones to rounding), so what a seed passes, it passes
  everywhere;
- a few operations on Python's numbers, or one on float32's, by ``pytest.approx``, whose default of
  1e-6 is above 16 of those.
"""

import torch

# What float32 may lose in a tiny network with outputs around 1: matrix products of some 100 terms,
# 36 in a row, if all their errors were of one sign. Seen are 2e-6.
FLOAT32_NETWORK = dict(rtol=0, atol=2e-4)


def rounding(terms, size, dtype=torch.float64):
    """Bound of the error of a sum of products, in any order, fused or not.

    Args:
        terms: Number of operations one after the other; n for a sum of n products.
        size: Sum of the absolute values of the products.
        dtype: What the sum is computed in.
    """
    return terms * torch.finfo(dtype).eps / 2 * size


def assert_far_above_rounding(in_float64, in_float32, rtol, atol):
    """Tolerances of a test in float64, checked by the same computation in float32.

    That one has to be within 2^29 / 100 of the tolerances: in float64, the same chain of operations
    is then off by a hundredth of them.
    """
    scale = 2**29 / 100
    for exact, rough in zip(in_float64, in_float32, strict=True):
        assert exact.dtype == torch.float64 and rough.dtype == torch.float32
        torch.testing.assert_close(rough.double(), exact, rtol=scale * rtol, atol=scale * atol)
