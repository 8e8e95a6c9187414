import pytest
import torch

from ser_mm.models import SimpleFPN
from tests.support.rounding import rounding


def test_pyramid_is_that_of_vitdet():
    neck = SimpleFPN(in_channels=64, out_channels=32, num_outs=5).double()
    outs = neck((torch.randn(2, 64, 6, 10, dtype=torch.float64),))
    assert [tuple(out.shape) for out in outs] == [
        (2, 32, 24, 40),
        (2, 32, 12, 20),
        (2, 32, 6, 10),
        (2, 32, 3, 5),
        (2, 32, 2, 3),
    ]
    assert torch.equal(outs[4], outs[3][..., ::2, ::2])  # no 3x3 window: P6 subsamples P5
    shapes = [
        {n.split('.')[1]: list(p.shape) for n, p in level.named_parameters(str(i)) if p.ndim > 1}
        for i, level in enumerate(neck.levels)
    ]
    assert [list(level.values()) for level in shapes] == [
        [[64, 32, 2, 2], [32, 16, 2, 2], [32, 16, 1, 1], [32, 32, 3, 3]],
        [[64, 32, 2, 2], [32, 32, 1, 1], [32, 32, 3, 3]],
        [[32, 64, 1, 1], [32, 32, 3, 3]],
        [[32, 64, 1, 1], [32, 32, 3, 3]],
    ]
    # Normalized over the channels of each place.
    assert outs[0].mean(dim=1).abs().max() < rounding(32 + 2, outs[0].abs().max())


@pytest.mark.parametrize(
    ('argument', 'message'),
    [(dict(scale_factors=(3, 1)), 'scale_factors'), (dict(num_outs=3), 'num_outs=3')],
)
def test_pyramid_refuses(argument, message):
    with pytest.raises(ValueError, match=message):
        SimpleFPN(in_channels=64, **argument)
