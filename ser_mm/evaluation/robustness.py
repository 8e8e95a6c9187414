"""ImageNet-C and ImageNet-P: data, and the metrics of Hendrycks & Dietterich (ICLR 2019).

Source of names, formulas and reference figures: arXiv 1903.12261 and the authors' repository,
https://github.com/hendrycks/robustness.
"""

import inspect
import zlib
from collections.abc import Sequence
from copy import deepcopy

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch import Tensor

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
SEVERITIES = (1, 2, 3, 4, 5)
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
VIDEOS = ('.mp4',)


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


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt an image as in ImageNet-C, by the ``imagecorruptions`` package.

    The noise depends on the path of the image, the corruption and the severity alone. The
    published images went through a JPEG of quality 85 after that, these do not.

    **Modified keys**: img

    Args:
        corruption (str): Name, e.g. 'defocus_blur'.
        severity (int): 1 to 5.

    Raises:
        ImportError: If ``imagecorruptions`` is missing.
        ValueError: If there is no such corruption or severity.
    """

    def __init__(self, corruption: str, severity: int) -> None:
        try:
            from imagecorruptions import corrupt, corruption_dict
        except ImportError as error:
            raise ImportError(
                'Corrupt: corruptions on the fly need `pip install imagecorruptions-imaug`; '
                'or name the folder of ImageNet-C.'
            ) from error
        if corruption not in corruption_dict or severity not in SEVERITIES:
            raise ValueError(
                f"Corrupt: corruption='{corruption}', severity={severity}: choose one of "
                f'{", ".join(corruption_dict)}, and 1 to 5.'
            )
        self.corrupt = corrupt
        self.corruption = corruption
        self.severity = severity
        self.takes_seed = 'seed' in inspect.signature(corruption_dict[corruption]).parameters

    def transform(self, results: dict) -> dict:
        """Corrupt ``img``, (H, W, 3), uint8, BGR, of at least 32 x 32.

        Args:
            results (dict): With ``img`` and ``img_path``.

        Returns:
            dict: With the corrupted ``img``.
        """
        name = f'{results["img_path"]} {self.corruption} {self.severity}'
        seed = zlib.crc32(name.encode())
        state = np.random.get_state()
        np.random.seed(seed)  # some corruptions draw from this one, others take a seed
        try:
            image = self.corrupt(
                np.ascontiguousarray(results['img'][..., ::-1]),
                severity=self.severity,
                corruption_name=self.corruption,
                **(dict(seed=seed) if self.takes_seed else {}),
            )
        finally:
            np.random.set_state(state)
        results['img'] = np.ascontiguousarray(image[..., ::-1])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(corruption='{self.corruption}', severity={self.severity})"


@DATASETS.register_module()
class SequenceFolder(CustomDataset):
    """Videos in class folders, each a sequence of frames with one label.

    An item has ``inputs`` of shape (T, 3, H, W). All videos have to have as many frames as the
    first.

    Args:
        extensions (Sequence[str]): Of the files. Defaults to ('.mp4',).
        **kwargs: Those of MMPretrain's ``CustomDataset``; the pipeline begins with the frame.
    """

    def __init__(self, *args, extensions: Sequence[str] = VIDEOS, **kwargs) -> None:
        super().__init__(*args, extensions=extensions, **kwargs)
        self.frames = len(mmcv.VideoReader(self.get_data_info(0)['img_path']))

    def prepare_data(self, idx: int) -> dict:
        """Read a video and put each of its frames through the pipeline.

        Args:
            idx (int): Index of the video.

        Returns:
            dict: ``inputs`` and ``data_samples``, the data sample of the first frame.

        Raises:
            ValueError: If the video has less than two frames that can be read, or not as many as
                the first video.
        """
        info = self.get_data_info(idx)
        frames = [
            self.pipeline(dict(info, img=frame, img_shape=frame.shape[:2]))
            for frame in mmcv.VideoReader(info['img_path'])
        ]
        if len(frames) < 2 or len(frames) != self.frames:
            raise ValueError(
                f'{info["img_path"]} has {len(frames)} readable frames, the first video '
                f'{self.frames}; replace it.'
            )
        inputs = torch.stack([frame['inputs'] for frame in frames])
        return dict(inputs=inputs, data_samples=frames[0]['data_samples'])
