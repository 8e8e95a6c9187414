"""ImageNet-C and ImageNet-P: data, and the metrics of Hendrycks & Dietterich (ICLR 2019).

Source of names, formulas and reference figures: arXiv 1903.12261 and the authors' repository,
https://github.com/hendrycks/robustness.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, nn

from ser_mm.datasets.sequence_folder import VIDEOS
from ser_mm.datasets.transforms.corrupt import SEVERITIES
from ser_mm.engine.checks import check_dataset
from ser_mm.engine.images import check_classes
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.results import make_table

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
FRAMES = 31
"""Of most sequences of ImageNet-P."""


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
        raise ValueError(f'{min(odd)} is not a perturbation out of {", ".join(PERTURBATIONS)}.')
    result = {name: value / ALEXNET_FLIPS[name] for name, value in flips.items()}
    if len(result) == len(PERTURBATIONS):
        result['mFR'] = float(np.mean(list(result.values())))
    return result


def corrupted(
    dataset: dict, corruption: str, severity: int, root: str | Path | None = None
) -> dict:
    """The config of a data set in a corruption.

    Args:
        dataset (dict): Config of the clean one, its pipeline ending in ``PackInputs``.
        corruption (str): One of ``CORRUPTIONS``, or another that ``imagecorruptions`` knows.
        severity (int): 1 to 5.
        root (str | Path, optional): Folder of ImageNet-C,
            ``root/corruption/severity/class/*.JPEG``. Its images are cropped already, so the
            pipeline's resize is left out. Defaults to None: the clean images are corrupted on the
            fly, when they are cropped.

    Raises:
        ValueError: If the data set loads images by ``LoadChannels``.
    """
    dataset = deepcopy(dict(dataset))
    pipeline = list(dataset['pipeline'])
    if pipeline and _name(pipeline[0]) == 'LoadChannels':
        channels, dtype = pipeline[0]['channels'], pipeline[0]['dtype']
        raise ValueError(
            f'evaluation.val has images of {channels} channels of {dtype}, by LoadChannels, and '
            'corruptions are for colour images of 8 bits; use probe and equivariance instead.'
        )
    if root is None:
        corrupt = dict(type='Corrupt', corruption=corruption, severity=severity)
        return dict(dataset, pipeline=[*pipeline[:-1], corrupt, pipeline[-1]])
    return dict(
        type='CustomDataset',
        data_root=str(root),
        data_prefix=f'{corruption}/{severity}',
        pipeline=[step for step in pipeline if not _name(step).startswith('Resize')],
    )


def perturbed(dataset: dict, perturbation: str, root: str | Path) -> dict:
    """The config of the sequences of a perturbation.

    Args:
        dataset (dict): Config of the clean data set.
        perturbation (str): One of ``PERTURBATIONS``.
        root (str | Path): Folder of ImageNet-P, ``root/perturbation/class/*.mp4``. The frames are
            cropped already, so the pipeline's resize is left out.
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


def corrupted_datasets(
    dataset: dict, corruptions: Sequence[str] = CORRUPTIONS, root: Path | None = None
) -> dict[str, dict]:
    """Configs of a data set in all severities of some corruptions.

    Args:
        dataset (dict): Config of the clean one, see :func:`corrupted`.
        corruptions (Sequence[str]): Of ``CORRUPTIONS``. Defaults to all.
        root (Path, optional): Folder of ImageNet-C. Defaults to None: corrupted on the fly.

    Returns:
        dict[str, dict]: By 'corruption/severity', their folders in ``root``.
    """
    return {
        f'{name}/{severity}': corrupted(dataset, name, severity, root)
        for name in corruptions
        for severity in SEVERITIES
    }


def perturbed_datasets(dataset: dict, root: Path) -> dict[str, dict]:
    """Configs of the sequences of all perturbations.

    Args:
        dataset (dict): Config of the clean data set, see :func:`perturbed`.
        root (Path): Folder of ImageNet-P.

    Returns:
        dict[str, dict]: By perturbation, their folders in ``root``.
    """
    return {name: perturbed(dataset, name, root) for name in PERTURBATIONS}


def add_datasets(
    cfg: Config, datasets: dict[str, dict], root: Path | None
) -> tuple[list[str], list[str]]:
    """Add data sets to ``cfg.evaluation``, checked before the long work.

    Args:
        cfg (Config): With the clean images as ``evaluation.val``.
        datasets (dict[str, dict]): Configs by name, which is their folder in ``root``.
        root (Path, optional): None for images that are made on the fly.

    Returns:
        tuple: Names of those added, and of those whose folder is missing.

    Raises:
        FileNotFoundError: If a folder has no images.
        ValueError: If a folder has other classes.
    """
    missing = [name for name in datasets if root and not (root / name).is_dir()]
    names = [name for name in datasets if name not in missing]
    for name in names:
        if root and is_main_process():
            check_dataset(name, datasets[name], 'mmpretrain')
            check_classes({'evaluation.val': cfg.evaluation.val, name: datasets[name]})
        cfg.evaluation[name] = datasets[name]
    return names, missing


def classify(source: CachedFeatures, head: nn.Linear, split: str) -> tuple[Tensor, Tensor]:
    """Classes that a head gives the images of a data set, and their labels.

    Args:
        source (CachedFeatures): Network and data sets.
        head (nn.Linear): Linear classifier of the features.
        split (str): Key of ``evaluation``.

    Returns:
        tuple: Classes (N,), of sequences (N, T), and labels (N,).
    """
    size = None
    if source.cfg.evaluation[split].type == 'SequenceFolder':
        size = max(1, source.batch_size // FRAMES)
    return source.load(split, head, size)


def measure_corruptions(
    source: CachedFeatures,
    head: nn.Linear,
    names: Sequence[str],
    images: int,
    missing: Sequence[str] = (),
    root: Path | None = None,
) -> dict:
    """Errors of a network under corruptions, and the metrics of ImageNet-C.

    Args:
        source (CachedFeatures): Network and data sets.
        head (nn.Linear): Linear classifier of the features.
        names (Sequence[str]): Keys of ``evaluation``, as :func:`corrupted_datasets` makes them.
        images (int): Clean images; a folder with fewer or more does not count.
        missing (Sequence[str]): Folders that are missing. Defaults to ().
        root (Path, optional): Folder of ImageNet-C. Defaults to None: made on the fly.

    Returns:
        dict: ``errors`` by corruption, at each of five severities, for those that have all five;
        ``CE`` (see :func:`corruption_errors`), ``top1`` and ``mean_top1`` of them; ``missing`` or
        incomplete folders; and the ``source`` of the images.
    """
    errors, incomplete = {}, []
    for name in names:
        classes, labels = classify(source, head, name)
        error = float((classes != labels).double().mean())
        if len(labels) != images:
            incomplete.append(f'{name} ({len(labels)} of {images} images)')
        else:
            errors.setdefault(name.partition('/')[0], []).append(error)
        if is_main_process():
            print(f'{name}: top-1 {1 - error:.4f}', flush=True)
    errors = {name: values for name, values in errors.items() if len(values) == len(SEVERITIES)}
    top1 = {name: 1 - sum(values) / len(values) for name, values in errors.items()}
    result = dict(
        errors=errors,
        missing=[*incomplete, *missing],
        CE=corruption_errors(errors),
        top1=top1,
        source=f'ImageNet-C as published, from {root}'
        if root
        else 'validation images corrupted on the fly by imagecorruptions: not the published files',
    )
    return result | (dict(mean_top1=sum(top1.values()) / len(top1)) if top1 else {})


def measure_perturbations(
    source: CachedFeatures, head: nn.Linear, names: Sequence[str], missing: Sequence[str] = ()
) -> dict:
    """Flips of a network under perturbations, and the metrics of ImageNet-P.

    Args:
        source (CachedFeatures): Network and data sets.
        head (nn.Linear): Linear classifier of the features.
        names (Sequence[str]): Keys of ``evaluation``, as :func:`perturbed_datasets` makes them.
        missing (Sequence[str]): Perturbations that are missing. Defaults to ().

    Returns:
        dict: ``top1`` and ``flips``, the flip probability, by perturbation, and their means
        ``mean_top1`` and ``mean_flips``; ``FR`` (see :func:`flip_rates`); and what is ``missing``.
    """
    top1, flips = {}, {}
    for name in names:
        classes, labels = classify(source, head, name)
        top1[name] = float((classes == labels[:, None]).double().mean())
        flips[name] = flip_probability(classes, noise='noise' in name)
        if is_main_process():
            print(f'{name}: top-1 {top1[name]:.4f}, flips {flips[name]:.4f}', flush=True)
    result: dict[str, Any] = dict(
        top1=top1, flips=flips, missing=list(missing), FR=flip_rates(flips)
    )
    if flips:
        means = [sum(values.values()) / len(values) for values in (top1, flips)]
        result |= dict(zip(('mean_top1', 'mean_flips'), means, strict=True))
    return result


def report_corruptions(result: dict) -> str:
    """Table of ImageNet-C in Markdown.

    Args:
        result (dict): What :func:`measure_corruptions` returned.
    """
    errors = result['errors']
    rows = [
        [name, result['top1'][name], *(1 - value for value in values), result['CE'][name]]
        for name, values in errors.items()
    ]
    if errors:
        means = [sum(row[i] for row in rows) / len(rows) for i in range(2, 7)]
        rows.append(['mean', result['mean_top1'], *means, result['CE'].get('mCE', '-')])
    header = ['corruption', 'top-1', *(f'severity {s}' for s in SEVERITIES), 'CE']
    notes = [f'Source: {result["source"]}.']
    left_out = [name for name in CORRUPTIONS if name not in errors]
    if left_out:
        notes.append(f'No mCE without {", ".join(left_out)}.')
    if result['missing']:
        notes.append(f'Missing or incomplete: {", ".join(result["missing"])}.')
    notes.append(
        "CE: error relative to AlexNet's on ImageNet-C, their mean is mCE; on other data it serves "
        'for comparisons only.'
    )
    return '\n'.join([make_table(header, rows), '', *(f'- {note}' for note in notes)])


def report_perturbations(result: dict, root: Path) -> str:
    """Table of ImageNet-P in Markdown.

    Args:
        result (dict): What :func:`measure_perturbations` returned.
        root (Path): Folder of ImageNet-P.
    """
    top1, flips, rates = result['top1'], result['flips'], result['FR']
    rows = [[name, top1[name], flips[name], rates[name]] for name in flips]
    if flips:
        rows.append(['mean', result['mean_top1'], result['mean_flips'], rates.get('mFR', '-')])
    notes = [f'Source: ImageNet-P as published, from {root}.']
    if result['missing']:
        notes.append(f'No mFR without {", ".join(result["missing"])}, which are missing.')
    notes.append("FR: flip probability relative to AlexNet's, their mean is mFR.")
    table = make_table(['perturbation', 'top-1', 'flip probability', 'FR'], rows)
    return '\n'.join([table, '', *(f'- {note}' for note in notes)])
