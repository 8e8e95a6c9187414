"""Matches beside a loop over tokens, and maps whose score is known."""

import math

import pytest
import skimage.data
import torch
import torch.nn.functional as F

from ser_mm.evaluation.correspondence import (
    correspondence_by_layer,
    count_matches,
    make_pairs,
)
from ser_mm.evaluation.warping import Warp, cell_centres, draw_warps, rotations

WARPS = {'30': [Warp(30)], '90': [Warp(90)], 'affine': draw_warps(3)}


def photos(count=6, side=48):
    picture = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1).double() / 255
    crops = picture.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
    return crops[:: len(crops) // count][:count].contiguous()


def loop(before, after, size, warp, within):
    """Right matches, tokens asked for and what chance gives, in plain Python."""
    _, rows, columns = before.shape
    height, width = size
    angle = math.radians(warp.angle)
    cos, sin = math.cos(angle), math.sin(angle)

    def forward(x, y):
        moved = warp.scale * (cos * x + sin * y), warp.scale * (cos * y - sin * x)
        return moved[0] + warp.shift[0] * width, moved[1] + warp.shift[1] * height

    def backward(x, y):
        x, y = x - warp.shift[0] * width, y - warp.shift[1] * height
        return (cos * x - sin * y) / warp.scale, (cos * y + sin * x) / warp.scale

    def shows_the_image(row, column):
        corners = [
            backward(
                (column + a) * width / columns - width / 2, (row + b) * height / rows - height / 2
            )
            for a in (0, 1)
            for b in (0, 1)
        ]
        return all(abs(x) <= width / 2 + 1e-6 and abs(y) <= height / 2 + 1e-6 for x, y in corners)

    keys = [(r, c) for r in range(rows) for c in range(columns) if shows_the_image(r, c)]
    found = asked = chance = 0
    for r in range(rows):
        for c in range(columns):
            x, y = forward(
                (c + 0.5) * width / columns - width / 2, (r + 0.5) * height / rows - height / 2
            )
            column = x * columns / width + columns / 2
            row = y * rows / height + rows / 2
            if (math.floor(row), math.floor(column)) not in keys:
                continue

            def is_near(key, row=row, column=column):
                return math.hypot(key[0] + 0.5 - row, key[1] + 0.5 - column) <= within + 1e-9

            asked += 1
            chance += sum(map(is_near, keys)) / len(keys)
            query = before[:, r, c].double()
            alike = [
                float(
                    query @ after[:, i, j].double() / query.norm() / after[:, i, j].double().norm()
                )
                for i, j in keys
            ]
            found += is_near(keys[alike.index(max(alike))])
    return found, asked, chance


@pytest.mark.parametrize('within', [0.8, 1.7])
@pytest.mark.parametrize('warp', [Warp(0), Warp(30), Warp(270), *draw_warps(3, seed=1)])
def test_matches_are_those_of_a_loop(warp, within):
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, 6, 9, generator=rng)
    size = (48, 90)
    pairs = make_pairs((6, 9), size, warp, within)
    found, asked, chance = loop(before, after, size, warp, within)
    assert len(pairs.near) == asked > 5
    assert count_matches(before, after, pairs) == found
    assert float(pairs.near.double().mean(dim=1).sum()) == pytest.approx(chance, abs=1e-9)


def codes(count=3, side=48):
    """Images whose colours tell the place: directions (x, y, 1), the same in no two places."""
    places = cell_centres((side, side), (side, side)).T.view(1, 2, side, side) / side
    return torch.cat([places, torch.full((1, 1, side, side), 0.5)], dim=1).expand(count, -1, -1, -1)


def pooled(images):
    return [F.avg_pool2d(images, 8), F.avg_pool2d(images, 4)]


def test_places_as_features_are_at_the_ceiling():
    scores = correspondence_by_layer(pooled, [codes()], {**WARPS, **rotations(45)})
    for layers in scores.values():
        for layer in layers:
            assert layer['matched'] == layer['ceiling'] == 1
            # All images are the same, so the wrong one is right: places alone did it.
            assert layer['wrong_image'] == 1 and layer['chance'] < 0.4
    tight = correspondence_by_layer(pooled, [codes()], {'30': [Warp(30)]}, within=0.5)['30'][0]
    assert 0.5 < tight['ceiling'] < 1
    assert tight['matched'] <= tight['ceiling']


def test_places_of_the_frame_are_not_those_of_the_image():
    """Position embeddings alone: the same map whatever the image, which is right at 0 only."""

    def embedded(images):
        return [F.avg_pool2d(codes(len(images)), 8)]

    warps = {'0': [Warp(0)], '90': [Warp(90)]}
    scores = correspondence_by_layer(embedded, [photos()], warps)
    upright, turned = scores['0'][0], scores['90'][0]
    assert upright['matched'] == upright['wrong_image'] == 1
    assert turned['matched'] == turned['wrong_image'] < 0.3


def test_photographs_are_found_by_what_no_turn_changes():
    def statistics(images):
        return [torch.cat([F.avg_pool2d(images, 8), F.max_pool2d(images, 8)], 1)]

    scores = correspondence_by_layer(statistics, [photos()], {'0': [Warp(0)], **WARPS})
    assert scores['0'][0]['matched'] == scores['90'][0]['matched'] == 1
    assert scores['0'][0]['tokens'] == scores['90'][0]['tokens'] == 36
    # Of 6 x 6 tokens, 4 have 3 within a token, themselves and 2, 16 have 4, and 16 have 5.
    near = 4 * 3 + 16 * 4 + 16 * 5
    assert scores['0'][0]['chance'] == scores['90'][0]['chance'] == pytest.approx(near / 36**2)
    for layers in scores.values():
        assert layers[0]['matched'] > 1.5 * layers[0]['wrong_image']
        assert layers[0]['matched'] > 1.5 * layers[0]['chance']


def test_constant_and_random_maps_are_at_chance():
    def constant(images):
        return [torch.full((len(images), 5, 6, 6), 0.3)]

    scores = correspondence_by_layer(constant, [photos()], WARPS)
    for (layer,) in scores.values():
        assert layer['matched'] == pytest.approx(layer['chance'], abs=1e-12)
        assert layer['wrong_image'] == pytest.approx(layer['chance'], abs=1e-12)

    rng = torch.Generator().manual_seed(0)

    def noise(images):
        return [torch.randn(len(images), 16, 6, 6, generator=rng)]

    count = 300
    scores = correspondence_by_layer(noise, torch.zeros(count, 3, 48, 48).split(100), WARPS)
    for name, (layer,) in scores.items():
        # Given its keys, the queries of an image are drawn alike and apart from each other, so the
        # variance of their hits is at most 1 / 4 each; warps of one name share no draw.
        draws = count * layer['tokens'] * len(WARPS[name])
        assert abs(layer['matched'] - layer['chance']) < 5 * (0.25 / draws) ** 0.5


def test_batches_and_scale_do_not_matter():
    def scaled(images):
        return [1000 * f for f in pooled(images)]

    whole = correspondence_by_layer(pooled, [photos()], WARPS)
    for maps, batches in ((scaled, photos().split(1)), (pooled, photos().split(4))):
        other = correspondence_by_layer(maps, batches, WARPS)
        for name, layers in whole.items():
            for i, layer in enumerate(layers):
                assert other[name][i] == pytest.approx(layer, abs=1e-12)


def test_what_cannot_be_asked_for_is_nan():
    one = correspondence_by_layer(lambda x: [x.mean((2, 3), True)], [photos(1)], WARPS)
    assert math.isnan(one['30'][0]['matched']) and math.isnan(one['30'][0]['chance'])
    assert one['90'][0]['matched'] == one['90'][0]['chance'] == 1  # all there is
    assert math.isnan(one['90'][0]['wrong_image'])
    with pytest.raises(ValueError, match='batches has no image'):
        correspondence_by_layer(pooled, [], WARPS)
