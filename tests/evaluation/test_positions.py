"""The position probe beside scikit-learn, and on maps whose score is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge as OtherRidge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ser_mm.evaluation.positions import Ridge, pixels_as_map, position_by_layer


def images(count, seed=0, side=32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=rng, dtype=torch.float64)


def rows_of(count, height, width):
    """Columns and rows of tokens in [-1, 1], written out."""
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / height * 2 - 1,
        (np.arange(width) + 0.5) / width * 2 - 1,
        indexing='ij',
    )
    return np.tile(np.stack([x.ravel(), y.ravel()], axis=1), (count, 1))


@pytest.mark.parametrize('alpha', [1e-3, 1.0, 50.0])
def test_ridge_is_that_of_another_library(alpha):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 6)) * [1, 10, 0.1, 1, 1, 0] + [0, 5, 1000, -3, 0, 0.3]
    y = x[:, :2] @ rng.normal(size=(2, 2)) + rng.normal(size=(90, 2))
    ridge = Ridge(alpha)
    for part in np.array_split(np.arange(90), 4):
        ridge.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    theirs = make_pipeline(StandardScaler(), OtherRidge(alpha)).fit(x, y)
    # Standardized, the condition number is below 10 and rounding of 1000 / 0.1 is 1e-12.
    np.testing.assert_allclose(
        ridge.solve()(torch.from_numpy(x)).numpy(), theirs.predict(x), atol=1e-9
    )
    with pytest.raises(ValueError, match='no features to fit on'):
        Ridge().solve()


def test_scores_are_those_of_another_library():
    def maps(x):
        pooled = F.avg_pool2d(x, (4, 8))
        drift = torch.linspace(-1, 1, 8, dtype=x.dtype).view(1, 1, 8, 1)
        return [torch.cat([pooled, pooled[:, :1] + drift], dim=1)]

    train, val = images(20), images(12, seed=1)
    (found,) = position_by_layer(maps, train.split(7), val.split(5))
    x, v = (maps(part)[0].flatten(2).transpose(1, 2).flatten(0, 1).numpy() for part in (train, val))
    theirs = make_pipeline(StandardScaler(), OtherRidge(1.0)).fit(x, rows_of(20, 8, 4))
    predicted, places = theirs.predict(v), rows_of(12, 8, 4)
    column, row = r2_score(places, predicted, multioutput='raw_values')
    both = r2_score(places, predicted, multioutput='variance_weighted')
    assert found == pytest.approx(dict(r2=both, row=row, column=column), abs=1e-9)
    assert row > 0.5 > abs(column)


def test_floor_and_ceiling():
    places = torch.from_numpy(rows_of(1, 4, 4).T.reshape(1, 2, 4, 4))
    rng = torch.Generator().manual_seed(0)

    def maps(x):
        code = places.expand(len(x), -1, -1, -1)
        noise = torch.randn(len(x), 8, 4, 4, generator=rng)
        return [code, noise, torch.full((len(x), 3, 4, 4), 0.3), x.mean((2, 3), True)]

    train, val = images(100), images(50, seed=1)
    code, noise, constant, one = position_by_layer(maps, train.split(30), val.split(30))
    # A penalty of 1 beside 1600 tokens shrinks by 1 / 1601, whose square is lost.
    assert code['r2'] == code['row'] == pytest.approx(1, abs=1e-6)
    assert constant == pytest.approx(dict(r2=0, row=0, column=0), abs=1e-12)
    # 8 features fit noise: R2 falls by about 8 / 1600 below 0.
    assert -0.05 < noise['r2'] < 0.02
    assert all(map(math.isnan, one.values()))
    with pytest.raises(ValueError, match='train or val has no image'):
        position_by_layer(maps, [], [val])
    with pytest.raises(ValueError, match='train or val has no image'):
        position_by_layer(maps, [train], [])


def test_pixels_of_patches():
    x = images(2)
    pixels = pixels_as_map(x, (4, 4))
    assert pixels.shape == (2, 192, 4, 4)
    torch.testing.assert_close(
        pixels[0, :, 1, 2].sort().values, x[0, :, 8:16, 16:24].flatten().sort().values
    )
    assert pixels_as_map(x, (5, 5)) is None and pixels_as_map(x, (4, 8)) is None
    assert pixels_as_map(images(1, side=80), (1, 1)) is None
