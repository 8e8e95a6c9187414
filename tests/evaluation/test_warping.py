"""Warps of images beside those of scikit-image and OpenCV."""

import math

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from skimage.transform import AffineTransform

from ser_mm.evaluation.warping import (
    Warp,
    cell_centres,
    disc,
    draw_warps,
    rotations,
    visible_cells,
    warp_images,
)

WARPS = [Warp(30), Warp(200, 1.3), Warp(90, 0.8, (0.1, -0.05)), *draw_warps(3)]


def photo(side=64):
    crop = skimage.data.chelsea()[100 : 100 + side, 150 : 150 + side]
    return torch.from_numpy(crop / 255).permute(2, 0, 1)[None]


def other_transform(warp, size):
    """The map between pixel indices, as scikit-image makes it; its angles are clockwise here."""
    (height, width), (x, y) = size, warp.shift
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    moved = AffineTransform(
        scale=warp.scale,
        rotation=-math.radians(warp.angle),
        translation=centre + [x * width, y * height],
    )
    return AffineTransform(translation=-centre) + moved


@pytest.mark.parametrize('warp', WARPS)
def test_places_are_those_of_another_library(warp):
    size = (48, 80)
    centres = cell_centres(size, size)
    index = centres.numpy() + [39.5, 23.5]
    np.testing.assert_allclose(index[81], [1, 1])  # row by row, x first
    there = other_transform(warp, size)(index) - [39.5, 23.5]
    np.testing.assert_allclose(warp.move(centres, size).numpy(), there, atol=1e-10)
    back = warp.move_back(warp.move(centres, size), size)
    torch.testing.assert_close(back, centres, atol=1e-10, rtol=0)


@pytest.mark.parametrize('warp', [w for w in WARPS if w.scale >= 1])
def test_pixels_are_those_of_opencv(warp):
    """OpenCV's bicubic weights are the same, at places that it rounds to 1 / 32 of a pixel."""
    image = photo().float()
    array = image[0].permute(1, 2, 0).numpy()
    matrix = other_transform(warp, (64, 64)).params[:2]
    theirs = cv2.warpAffine(
        array, matrix, (64, 64), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    ours = warp_images(image, warp)[0].permute(1, 2, 0).numpy()
    inside = visible_cells((64, 64), (64, 64), Warp(warp.angle, warp.scale, warp.shift))
    steps = max(np.abs(np.diff(array, axis=axis)).max() for axis in (0, 1))
    # 1 / 64 off in each of two directions, along which bicubic weights (a = -0.75) let values
    # change by at most 2.25 steps a pixel: |w'| of the four taps sums to less than 4.5.
    bound = 2 / 64 * 2.25 * steps
    error = np.abs(ours - theirs).max(axis=2).reshape(-1)[inside.numpy()]
    assert inside.float().mean() > 0.5 and error.max() < bound
    assert np.abs(ours - array).max() > 10 * bound  # it is another image


@pytest.mark.parametrize('turns', range(4))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_quarter_turns_are_exact(turns, dtype):
    image = photo().to(dtype)
    turned = torch.rot90(image, turns, (2, 3))
    # In float64 the sampling positions are rounded: by 64 pixels' units in the last place.
    slack = 0 if dtype == torch.float32 else 64 * 8 * 2**-52
    torch.testing.assert_close(warp_images(image, Warp(90 * turns)), turned, atol=slack, rtol=0)


def test_shrinking_does_not_alias():
    """Stripes of two pixels, bright in the middle of each four, become grey and not bright."""
    stripes = ((torch.arange(64) + 1) // 2 % 2).double().expand(1, 3, 64, 64)
    shrunk = warp_images(stripes, Warp(scale=0.25))[..., 26:38, 26:38]
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.5), atol=1e-9, rtol=0)


def test_what_is_beyond_the_border_is_left_out():
    grid = size = (8, 8)
    assert visible_cells(grid, size, Warp(90)).all()
    assert visible_cells(grid, size, Warp(45, 1.5)).all()
    seen = visible_cells(grid, size, Warp(shift=(0.25, 0))).view(grid)
    assert seen[:, 2:].all() and not seen[:, :2].any()
    # Of an image turned by 45 degrees, |x| + |y| <= 4 * sqrt(2) = 5.66 is seen.
    far = (cell_centres(grid, size).abs() + 0.5).sum(dim=1)
    assert torch.equal(visible_cells(grid, size, Warp(45)), far <= 4 * 2**0.5)


def test_no_turn_shows_a_border_in_the_disc():
    inside = disc((48, 48)).bool()
    assert inside.float().mean() == pytest.approx(math.pi * 22**2 / 48**2, abs=0.01)
    whole = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    image = whole[..., 8:56, 8:56]
    for angle in (0, 15, 45, 60, 90):
        torch.testing.assert_close(
            warp_images(whole, Warp(angle))[..., 8:56, 8:56][..., inside],
            warp_images(image, Warp(angle))[..., inside],
            atol=1e-9,
            rtol=0,
        )


def test_angles_by_name():
    assert list(rotations(45)) == ['0', '45', '90', '135', '180', '225', '270', '315']
    assert list(rotations(22.5))[1] == '22.5' and len(rotations()) == 24
    assert len(rotations(360 / 7)) == 7
    with pytest.raises(ValueError, match='step=0: give the degrees'):
        rotations(0)


def test_drawn_warps_are_in_their_ranges():
    drawn = draw_warps(200, seed=3)
    assert drawn == draw_warps(200, seed=3) != draw_warps(200)
    values = np.array([(w.angle, w.scale, *w.shift) for w in drawn])
    assert (values[:, 0] < 360).all() and values[:, 0].std() > 90
    assert (values.min(axis=0)[1:] > [0.75, -0.125, -0.125]).all()
    assert (values.max(axis=0)[1:] < [4 / 3, 0.125, 0.125]).all()
