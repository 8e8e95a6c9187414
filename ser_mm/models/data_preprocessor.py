from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from mmpretrain.models import SelfSupDataPreprocessor
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.arguments import (
    Interval,
    ModuleCfg,
    Positive,
    PositiveFloat,
    Rule,
    Share,
    checked,
    filled,
)
from ser_mm.geometry import NUM_ELEMENTS, act_on_images, draw_grid
from ser_mm.models.device_views import DeviceView
from ser_mm.models.photometry import Photometry
from ser_mm.views import ViewBatch, count_b2_of_rank

_CHANNELS = Rule('for one or three channels', lambda x: len(x) in (1, 3))

_CONVERSIONS = {'to_rgb', 'bgr_to_rgb', 'rgb_to_bgr'}


def pixels_of(owner: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std of the config of a preprocessor, which belong together.

    Args:
        owner (str): Whose it is, for the message.
        config (Mapping[str, Any]): The config.

    Returns:
        dict[str, Any]: ``mean`` and ``std``, or nothing.

    Raises:
        ValueError: If one is there without the other.
    """
    pixels = {key: config[key] for key in ('mean', 'std') if key in config}
    if len(pixels) == 1:
        (there,) = pixels
        raise ValueError(
            f'{owner}: data_preprocessor has a {there} without a '
            f'{"std" if there == "mean" else "mean"}; set both, as they belong together.'
        )
    return pixels


@MODELS.register_module()
@checked(
    mean=Annotated[Sequence[float], _CHANNELS] | None,
    std=Annotated[Sequence[PositiveFloat], _CHANNELS] | None,
    pad_size_divisor=Positive,
    pad_value=float,
)
class SERDataPreprocessor(SelfSupDataPreprocessor):
    """Normalize the views, split each into b1 and b2, and resize b2.

    The resize is the S of the group element g = S o D (paper, Section 3): per batch and per view,
    a grid of h x w tokens is drawn, its area ``scale`` times that of the base grid, and the images
    of b2 are resized to it bicubically.

    With ``views``, it makes the views, too, from batches of plain images of one size, and the
    pipeline of the data set ends with ``PackInputs`` right after the image is there. Views of b1
    are those of the pipelines. In b2, two views share the crop of the first, have no flip but an
    element of D4 each, drawn uniformly, and are otherwise as in b1: what
    :class:`~ser_mm.datasets.EquivariantViewPipeline` derives. Which images are in b2 is drawn here,
    with as many as there. All numbers are drawn on the host, from torch's generator.

    Args:
        scale (tuple[float, float]): Range of the area factor, uniform. Defaults to (0.7, 1.3).
        aspect_ratio (tuple[float, float]): Range of width / height, log-uniform.
            Defaults to (3 / 4, 4 / 3).
        patch_size (int): Pixels per token, the stride of the token map. Defaults to 16.
        photometry (Sequence[list[dict]], optional): For each view, photometric transforms to run
            on the device instead of in the pipeline, as configured there, see
            :class:`~ser_mm.models.photometry.Photometry`; ``[]`` for none. Defaults to None.
        views (Sequence[list[dict]], optional): The whole pipeline of each view, two or more, to run
            on the device, see :class:`~ser_mm.models.device_views.DeviceView`. Defaults to None:
            the batch has views.
        equi_ratio (float, optional): With ``views``, the share of the images of a global batch in
            b2, 0 to 1. Defaults to None: the views are plain tensors, for an algorithm without SER,
            and those of 0 from the same seed.
        non_blocking (bool): Do not wait for the copy to the device. Defaults to True.
        **kwargs: Those of MMPretrain's ``SelfSupDataPreprocessor``: mean, std, to_rgb, ...

    Raises:
        ValueError: If a range is reversed or not positive, ``patch_size`` is not positive,
            ``photometry`` or ``views`` have other transforms or do not say ``to_rgb``, the first
            two of ``views`` do not fit b2, or, at the first batch, it does not fit ``photometry``
            or ``views``, the geometry records are missing or the image size is not a multiple of
            ``patch_size``.
    """

    def __init__(
        self,
        scale: Interval = (0.7, 1.3),
        aspect_ratio: Interval = (3 / 4, 4 / 3),
        patch_size: Positive = 16,
        photometry: Sequence[list[ModuleCfg]] | None = None,
        non_blocking: bool = True,
        views: Annotated[Sequence[list[ModuleCfg]], filled] | None = None,
        equi_ratio: Share | None = None,
        **kwargs,
    ) -> None:
        super().__init__(non_blocking=non_blocking, **kwargs)
        self.scale = tuple(scale)
        self.aspect_ratio = tuple(aspect_ratio)
        self.patch_size = patch_size
        self.photometry = [Photometry(x) for x in photometry] if photometry else None
        self.views = [DeviceView(x) for x in views] if views else None
        self.equi_ratio = equi_ratio
        changes = [view.photometry for view in self.views or ()]
        if (photometry or any(changes)) and _CONVERSIONS.isdisjoint(kwargs):
            raise ValueError(
                'SERDataPreprocessor: photometry works on RGB images; set to_rgb=True, as '
                'pipelines load them in BGR order, or to_rgb=False where they are RGB, as of CIFAR.'
            )
        if photometry and views:
            raise ValueError(
                'SERDataPreprocessor: photometry is for views that pipelines make, and with views '
                'it stands in these; leave out photometry.'
            )
        self._check_b2()

    def forward(self, data: dict, training: bool = False) -> dict:
        """Make the containers that the base algorithm takes for its views.

        Args:
            data (dict): ``inputs``, the collated views (B, 3, H, W), uint8, followed by what was
                drawn for them (B, V, 18), if recorded, and by the geometry records (B, V) of
                :class:`~ser_mm.datasets.EquivariantViewPipeline`; ``data_samples``.
                A single tensor of images is only normalized.
            training (bool): Passed on. Defaults to False.

        Returns:
            dict: ``inputs``, a list of :class:`~ser_mm.views.ViewBatch` for the V first views
            and of tensors for further ones; ``data_samples``. Images of b2 come last in each.
        """
        if isinstance(data['inputs'], Tensor) and not (training and self.views):
            return super().forward(data, training)
        if self.views:
            return self._make_views(self.views, data['inputs'], data.get('data_samples'))
        *views, record = data['inputs']
        draws = views.pop() if views and getattr(views[-1], 'ndim', 0) == 3 else None
        self._check(views, record)

        # The record is read on the host, where it was made: the step never waits for the device.
        in_b2 = record[:, 0] >= 0
        sizes = [len(in_b2) - int(in_b2.sum()), int(in_b2.sum())]
        order, samples = _b2_last(in_b2, data.get('data_samples'))
        views, samples, order, elements, draws = self.cast_data(
            [views, samples, order, record[in_b2], draws]
        )
        photometry: Sequence[Photometry | None] = self.photometry or [None] * len(views)
        inputs = []
        for view, change in zip(views, photometry, strict=True):
            images = self._to_float(view[order])
            inputs.append(self._normalize(change(images) if change else images))
        for v, view in enumerate(inputs[: record.shape[1]]):
            base, equi = view.split(sizes)
            inputs[v] = ViewBatch(base, self._resize(equi), elements[:, v])
            inputs[v].draws = draws if draws is None else draws[order, v]
        return dict(inputs=inputs, data_samples=samples)

    def _make_views(
        self, views: list[DeviceView], images: Tensor, samples: Sequence | None
    ) -> dict:
        """The views of plain images, as tensors or with b2 apart."""
        self._check_images(images)
        n, _, height, width = images.shape
        n2 = count_b2_of_rank(self.equi_ratio or 0.0, n, get_rank(), get_world_size())
        images, samples = self.cast_data([images, samples])
        if n2:
            in_b2 = torch.zeros(n, dtype=torch.bool)
            in_b2[torch.randperm(n)[:n2]] = True
            order, samples = _b2_last(in_b2, samples)
            images = images[order.to(images.device, non_blocking=True)]
        images = self._to_float(images)
        inputs: list[Tensor | ViewBatch] = []
        shared = None
        for v, view in enumerate(views):
            crops = view.draw(n, (height, width))
            if n2 and v < 2:
                shared = crops.boxes if shared is None else shared
                crops.boxes[-n2:] = shared[-n2:]
                crops.flips[-n2:] = False
            made = self._normalize(view(images, crops))
            if self.equi_ratio is None or v >= 2:
                inputs.append(made)
                continue
            base, equi = made.split([n - n2, n2])
            elements = torch.randint(NUM_ELEMENTS, (n2,)) if n2 else torch.zeros(0).long()
            equi = self._resize(act_on_images(equi, elements))
            inputs.append(ViewBatch(base, equi, elements.to(equi.device, non_blocking=True)))
        return dict(inputs=inputs, data_samples=samples)

    def _to_float(self, images: Tensor) -> Tensor:
        """Without sending the device a list, the order of the channels, as the base class does."""
        return (images.flip(1) if self._channel_conversion else images).float()

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean).div_(self.std) if self._enable_normalize else images

    def _check_b2(self) -> None:
        """Refuse ``views`` of which b2 cannot have any."""
        if self.equi_ratio is None:
            return
        if not self.views or len(self.views) < 2:
            raise ValueError(
                f'SERDataPreprocessor: equi_ratio={self.equi_ratio:g} is the share of b2 in two or '
                'more views that are made here; give views=[...], the pipeline of each, or set '
                'equi_ratio in EquivariantViewPipeline, which makes them on the host.'
            )
        crops = [view.crop for view in self.views[:2]]
        for crop in crops:
            if crop is not None:
                self._check_size(*crop.scale)
        if self.equi_ratio > 0 and repr(crops[0]) != repr(crops[1]):
            raise ValueError(
                f'SERDataPreprocessor: equi_ratio={self.equi_ratio:g}, but the first two of views '
                'begin with other crops, and b2 has one for both; begin both with the same, or set '
                'equi_ratio=0.'
            )

    def _check_size(self, height: int, width: int) -> None:
        """Refuse images of b2 that the network, or a quarter turn, cannot take."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'SERDataPreprocessor: images of {height} x {width} are not whole patches of '
                f'patch_size={self.patch_size}; change the crop size of the views or '
                'patch_size.'
            )
        if self.equi_ratio and height != width:
            raise ValueError(
                f'SERDataPreprocessor: views of {height} x {width} cannot be turned by quarters, '
                f'as with equi_ratio={self.equi_ratio:g}; make them square.'
            )

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(
                'SERDataPreprocessor: views are made of plain images of one size, but the batch '
                f'has inputs of type {type(images).__name__}; let no other transform than '
                "PackInputs follow the image in the data set's pipeline, and collate with "
                'default_collate.'
            )
        if self.equi_ratio is not None:
            for view in (self.views or ())[:2]:
                self._check_size(*view.output_size(images.shape[-2:]))

    def _check(self, views: list[Tensor], record: Tensor) -> None:
        if not isinstance(record, Tensor):
            raise ValueError(
                'SERDataPreprocessor: the images of the batch are not stacked; set '
                "train_dataloader.collate_fn=dict(type='default_collate'), and have no other, such "
                'as pseudo_collate.'
            )
        if not views or record.ndim != 2 or record.dtype != torch.int64:
            raise ValueError(
                'SERDataPreprocessor: the batch has lost its geometry records: the last of '
                f'`inputs` is {tuple(record.shape)} {record.dtype}, not the (B, views) int64 table '
                'that EquivariantViewPipeline adds. Let EquivariantViewPipeline make the views, '
                'right before PackInputs, and collate with default_collate.'
            )
        if bool((record < -1).any()):  # on the host, where the record was made
            raise ValueError(
                'SERDataPreprocessor: nobody assigned the images of the batch to b1, b2 or pairs; '
                "start the run with `ser-mm train`, or add dict(type='EquivariantSplitHook') to "
                'its custom_hooks.'
            )
        if self.photometry and len(self.photometry) != len(views):
            raise ValueError(
                f'SERDataPreprocessor: photometry has {len(self.photometry)} lists, but a batch '
                f'{len(views)} views; give one list per view, [] for one without.'
            )
        for view in views[: record.shape[1]]:
            self._check_size(*view.shape[-2:])

    def _resize(self, images: Tensor) -> Tensor:
        """Resize (N2, 3, H, W) to a grid of tokens drawn for this batch and view."""
        if not len(images):
            return images  # and draw nothing, so that the base algorithm draws what it would alone
        base = [side / self.patch_size for side in images.shape[-2:]]
        grid = draw_grid(base, self.scale, self.aspect_ratio)
        size = [side * self.patch_size for side in grid]
        return F.interpolate(images, size, mode='bicubic', align_corners=False)


def _b2_last(in_b2: Tensor, samples: Sequence | None) -> tuple[Tensor, list | None]:
    """Order of a batch with b1 first, and its samples in that order."""
    order = in_b2.sort(stable=True).indices
    return order, [samples[i] for i in order.tolist()] if samples else None
