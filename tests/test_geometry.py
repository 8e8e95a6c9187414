"""rho: a group action, and equal to torch's turns, flips and resizes of maps."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ser_mm import geometry
from tests.support import reference

PAIRS = list(itertools.product(range(8), repeat=2))
# A sampling place is computed in five operations, so it is off by 5 u of the width, 13 here. Per
# pixel a bicubic value changes by 2 * 3 * 1.375 times the largest value, 4 here: the sums of the
# absolute kernel are 1.375 at most, those of its slope 3. With u = 1.1e-16 that is 2.4e-13, and the
# sum of 16 products adds a tenth. A second interpolation multiplies it by 1.375^2 and adds its own.
EXACT = dict(rtol=0, atol=1e-12)


def maps(n, *size, dtype=torch.float64):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_elements_are_a_group_of_eight():
    table = {tuple(m.flatten().tolist()) for m in geometry.D4}
    assert len(table) == geometry.NUM_ELEMENTS == len(geometry.ELEMENT_NAMES) == 8
    assert torch.equal(geometry.D4[0], torch.eye(2))
    for a, b in PAIRS:
        product = geometry.compose(*geometry.D4[[a, b], None])
        assert tuple(product.flatten().tolist()) in table
    assert torch.equal(
        geometry.compose(geometry.invert(geometry.D4), geometry.D4), torch.eye(2).expand(8, 2, 2)
    )


@pytest.mark.parametrize('size', [(4, 4), (5, 5), (3, 6)])
def test_equals_turns_and_flips(size):
    x = maps(8, *size)
    for element in range(8):
        expected = reference.move(x, element)
        g = geometry.matrices(torch.full((8,), element))
        torch.testing.assert_close(geometry.act(x, g, expected.shape[-2:]), expected, **EXACT)


def test_numbers_mean_the_same_for_pixels_and_maps():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    for element in range(8):
        moved = geometry.act_on_array(image, element)
        assert moved.flags.c_contiguous and moved.dtype == image.dtype
        assert np.array_equal(moved, reference.move(x[0], element).permute(1, 2, 0).numpy())
        acted = geometry.act(x, geometry.matrices(torch.tensor([element])), (6, 6))[0]
        # 64 times as large as in EXACT
        expected = torch.from_numpy(moved).permute(2, 0, 1).double()
        torch.testing.assert_close(acted, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('size', [(6, 6), (9, 5), (4, 13), (3, 3), (12, 12)])
def test_equals_bicubic_resize_after_the_element(size):
    x = maps(8, 6, 6)
    resized = F.interpolate(x, size, mode='bicubic', align_corners=False)
    identity = torch.eye(2).expand(8, 2, 2)
    torch.testing.assert_close(geometry.act(x, identity, size), resized, **EXACT)
    every = geometry.act(x, geometry.D4, size)
    for element in range(8):
        moved = reference.move(x[element : element + 1], element)
        expected = F.interpolate(moved, size, mode='bicubic', align_corners=False)[0]
        torch.testing.assert_close(every[element], expected, **EXACT)


def test_composes_on_maps():
    x = maps(64, 5, 5)
    inner, outer = geometry.matrices(torch.tensor(PAIRS)).unbind(1)
    twice = geometry.act(geometry.act(x, inner, (5, 5)), outer, (5, 5))
    once = geometry.act(x, geometry.compose(outer, inner), (5, 5))
    torch.testing.assert_close(twice, once, **EXACT)
    swapped = geometry.act(x, geometry.compose(inner, outer), (5, 5))
    # 24 pairs do not commute; random maps that are moved apart differ by more than 0.1 somewhere
    assert ((twice - swapped).abs().flatten(1).amax(1) > 0.1).sum() == 24


def test_a_resize_composes_with_the_elements_around_it():
    """h o (S o g) = S' o (h g): a turn before or after the resize, on the turned grid."""
    x = maps(64, 6, 6)
    inner, outer = geometry.matrices(torch.tensor(PAIRS)).unbind(1)
    for size in ((4, 7), (8, 5)):
        first = geometry.act(x, inner, size)
        for element in range(8):
            chosen = torch.tensor([b == element for _, b in PAIRS])
            end = tuple(reference.move(torch.empty(size), element).shape)
            twice = geometry.act(first[chosen], outer[chosen], end)
            once = geometry.act(x[chosen], geometry.compose(outer, inner)[chosen], end)
            torch.testing.assert_close(twice, once, **EXACT)


def test_inverts_and_keeps_on_maps():
    x = maps(8, 4, 7)
    for element in range(8):
        g = geometry.matrices(torch.full((8,), element))
        there = geometry.act(x, g, reference.move(x, element).shape[-2:])
        torch.testing.assert_close(geometry.act(there, geometry.invert(g), (4, 7)), x, **EXACT)
    identity = geometry.matrices(torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(geometry.act(x, identity, (4, 7)), x, **EXACT)


def test_gradient_of_an_element_is_its_inverse():
    x, y = maps(8, 4, 4).requires_grad_(), maps(8, 4, 4).flip(0)
    (grad,) = torch.autograd.grad(geometry.act(x, geometry.D4, (4, 4)), x, y)
    expected = torch.stack([reference.move(y[i], reference.inverse(i)) for i in range(8)])
    torch.testing.assert_close(grad, expected, **EXACT)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_elements_are_exact_in_lower_precision(dtype):
    x = maps(8, 4, 4, dtype=torch.float64).to(dtype)
    assert x.abs().min() > 1e-4  # so that half a step of float32 there, 3e-12, is more than EXACT
    moved = geometry.act(x, geometry.D4, (4, 4))
    assert moved.dtype == dtype
    assert torch.equal(moved, torch.stack([reference.move(x[i], i) for i in range(8)]))


def test_no_maps():
    none = geometry.act(maps(0, 4, 4), geometry.matrices(torch.zeros(0, dtype=torch.int64)), (3, 5))
    assert none.shape == (0, 3, 3, 5)


@pytest.mark.parametrize('n', [0, 24])
def test_batches_are_moved_as_arrays_are(n):
    images, elements = maps(n, 5, 5), torch.arange(n) % 8
    moved = geometry.act_on_images(images, elements)
    assert moved.shape == images.shape
    for x, y, element in zip(images, moved, elements.tolist(), strict=True):
        expected = geometry.act_on_array(x.permute(1, 2, 0).numpy(), element)
        np.testing.assert_array_equal(y.permute(1, 2, 0).numpy(), expected)
