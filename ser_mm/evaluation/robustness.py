"""ImageNet-C and ImageNet-P: data, and the metrics of Hendrycks & Dietterich (ICLR 2019).

Source of names, formulas and reference figures: arXiv 1903.12261 and the authors' repository,
https://github.com/hendrycks/robustness.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from torch import Tensor

from ser_mm.datasets.sequence_folder import VIDEOS
from ser_mm.datasets.transforms.corrupt import SEVERITIES

# Error of AlexNet (torchvision's) on each corruption, averaged over the five severities: the
# repository's table.
ALEXNET_ERRORS = dict(
    gaussian_noise=0.886428,
    shot_noise=0.894468,
    impulse_noise=0.922640,
    defocus_blur=0.819880,
    glass_blur=0.826268,
    motion_blur=0.785948,
    zoom_blur=0.798360,
    snow=0.866816,
    frost=0.826572,
    fog=0.819324,
    brightness=0.564592,
    contrast=0.853204,
    elastic_transform=0.646056,
    pixelate=0.717840,
    jpeg_compression=0.606500,
)
CORRUPTIONS = tuple(ALEXNET_ERRORS)
# Flip probability of AlexNet on each perturbation: the paper's appendix of full results.
ALEXNET_FLIPS = dict(
    gaussian_noise=0.2365,
    shot_noise=0.3006,
    motion_blur=0.0930,
    zoom_blur=0.0594,
    snow=0.1193,
    brightness=0.0489,
    translate=0.1101,
    rotate=0.1310,
    tilt=0.0705,
    scale=0.2353,
)
PERTURBATIONS = tuple(ALEXNET_FLIPS)


def corruption_errors(errors: dict[str, Sequence[float]]) -> dict[str, float]:
    """Corruption errors CE and their mean: errors relative to AlexNet's.

    Args:
        errors (dict[str, Sequence[float]]): For each corruption the error, in [0, 1], at each of
            the five severities.

    Returns:
        dict[str, float]: CE of each corruption and, if none of the 15 is missing, ``mCE``. 1 is
        as good as AlexNet, less is better.

    Raises:
        ValueError: If a corruption is not of ImageNet-C, or has not five errors.
    """
    for name, values in errors.items():
        if name not in ALEXNET_ERRORS or len(values) != len(SEVERITIES):
            raise ValueError(
                f'errors of {name}: {list(values)}; give five, one per severity, for a corruption '
                f'out of {", ".join(CORRUPTIONS)}.'
            )
    result = {name: float(np.mean(v)) / ALEXNET_ERRORS[name] for name, v in errors.items()}
    if len(result) == len(CORRUPTIONS):
        result['mCE'] = float(np.mean(list(result.values())))
    return result


def flip_probability(predictions: Tensor, noise: bool) -> float:
    """How often the predicted class changes along sequences.

    Args:
        predictions (Tensor): Classes, shape (N, T), T >= 2 frames.
        noise (bool): Whether frames are compared with the first one, which is clean, as for
            noise, and not each with the one before.

    Returns:
        float: In [0, 1].
    """
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return float((predictions[:, 1:] != before).double().mean())


def flip_rates(flips: dict[str, float]) -> dict[str, float]:
    """Flip rates FR and their mean: flip probabilities relative to AlexNet's.

    Args:
        flips (dict[str, float]): Flip probability, in [0, 1], of each perturbation.

    Returns:
        dict[str, float]: FR of each perturbation and, if none of the 10 is missing, ``mFR``. 1 is
        as stable as AlexNet, less is better.

    Raises:
        ValueError: If a perturbation is not of ImageNet-P.
    """
    odd = set(flips) - set(ALEXNET_FLIPS)
    if odd:
        raise ValueError(f'{min(odd)} is no perturbation out of {", ".join(PERTURBATIONS)}.')
    result = {name: value / ALEXNET_FLIPS[name] for name, value in flips.items()}
    if len(result) == len(PERTURBATIONS):
        result['mFR'] = float(np.mean(list(result.values())))
    return result


def corrupted(dataset: dict, corruption: str, severity: int, root: str | None = None) -> dict:
    """The config of a data set in a corruption.

    Args:
        dataset (dict): Config of the clean one, its pipeline ending in ``PackInputs``.
        corruption (str): One of ``CORRUPTIONS``, or another that ``imagecorruptions`` knows.
        severity (int): 1 to 5.
        root (str, optional): Folder of ImageNet-C, ``root/corruption/severity/class/*.JPEG``. Its
            images are cropped already, so the pipeline's resize is left out. Defaults to None: the
            clean images are corrupted on the fly, when they are cropped.
    """
    dataset = deepcopy(dict(dataset))
    pipeline = list(dataset['pipeline'])
    if root is None:
        corrupt = dict(type='Corrupt', corruption=corruption, severity=severity)
        return dict(dataset, pipeline=[*pipeline[:-1], corrupt, pipeline[-1]])
    return dict(
        type='CustomDataset',
        data_root=str(root),
        data_prefix=f'{corruption}/{severity}',
        pipeline=[step for step in pipeline if not _name(step).startswith('Resize')],
    )


def perturbed(dataset: dict, perturbation: str, root: str) -> dict:
    """The config of the sequences of a perturbation.

    Args:
        dataset (dict): Config of the clean data set.
        perturbation (str): One of ``PERTURBATIONS``.
        root (str): Folder of ImageNet-P, ``root/perturbation/class/*.mp4``. The frames are cropped
            already, so the pipeline's resize is left out.
    """
    pipeline = [step for step in dataset['pipeline'] if not _name(step).startswith(('Load', 'Res'))]
    return dict(
        type='SequenceFolder',
        data_root=str(root),
        data_prefix=perturbation,
        extensions=VIDEOS,
        pipeline=pipeline,
    )


def _name(step: dict) -> str:
    kind = step['type']
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__
