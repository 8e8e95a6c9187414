"""Metrics of ImageNet-C and ImageNet-P by hand."""

import pytest
import torch

from ser_mm.evaluation.robustness import (
    ALEXNET_ERRORS,
    ALEXNET_FLIPS,
    CORRUPTIONS,
    PERTURBATIONS,
    corruption_errors,
    flip_probability,
    flip_rates,
)


def test_mce_of_a_table_by_hand():
    """AlexNet's own errors give 1; the error of one corruption moves the mean by a 15th."""
    assert len(CORRUPTIONS) == 15
    errors = {name: [value] * 5 for name, value in ALEXNET_ERRORS.items()}
    assert corruption_errors(errors) == pytest.approx({**dict.fromkeys(CORRUPTIONS, 1), 'mCE': 1})
    # Mean error (0.1 + 0.2 + 0.3 + 0.4 + 0.5) / 5 = 0.3; 0.3 / 0.606500 = 0.494641.
    errors['jpeg_compression'] = [0.1, 0.2, 0.3, 0.4, 0.5]
    result = corruption_errors(errors)
    assert result['jpeg_compression'] == pytest.approx(0.494641, abs=1e-6)
    assert result['mCE'] == pytest.approx((14 + 0.494641) / 15, abs=1e-6)
    del errors['fog']
    assert 'mCE' not in corruption_errors(errors) and 'fog' not in corruption_errors(errors)
    with pytest.raises(ValueError, match=r'errors of fog: \[0.5\]; give five'):
        corruption_errors(dict(fog=[0.5]))


def test_flips_and_mfr_by_hand():
    classes = torch.tensor([[0, 0, 1, 1, 0], [2, 2, 2, 2, 2]])
    assert flip_probability(classes, noise=False) == 2 / 8  # 0-1 and 1-0
    assert flip_probability(classes[:, :4], noise=True) == 2 / 6  # two frames differ from the first
    assert len(PERTURBATIONS) == 10
    result = flip_rates(ALEXNET_FLIPS)
    assert result == pytest.approx({**dict.fromkeys(PERTURBATIONS, 1), 'mFR': 1})
    # 0.02445 / 0.0489 = 0.5
    assert flip_rates({**ALEXNET_FLIPS, 'brightness': 0.02445})['mFR'] == pytest.approx(0.95)
    assert flip_rates(dict(scale=0.2353)) == pytest.approx(dict(scale=1))
    with pytest.raises(ValueError, match='blur is not a perturbation'):
        flip_rates(dict(blur=1.0))
