from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from mmpretrain.models import SelfSupDataPreprocessor
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.arguments import Interval, ModuleCfg, Positive, PositiveFloat, Rule, checked
from ser_mm.geometry import draw_grid
from ser_mm.models.photometry import Photometry
from ser_mm.views import ViewBatch

_CHANNELS = Rule('for one or three channels', lambda x: len(x) in (1, 3))


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

    Args:
        scale (tuple[float, float]): Range of the area factor, uniform. Defaults to (0.7, 1.3).
        aspect_ratio (tuple[float, float]): Range of width / height, log-uniform.
            Defaults to (3 / 4, 4 / 3).
        patch_size (int): Pixels per token, the stride of the token map. Defaults to 16.
        photometry (Sequence[list[dict]], optional): For each view, photometric transforms to run
            on the device instead of in the pipeline, as configured there, see
            :class:`~ser_mm.models.photometry.Photometry`; ``[]`` for none. Defaults to None.
        non_blocking (bool): Do not wait for the copy to the device. Defaults to True.
        **kwargs: Those of MMPretrain's ``SelfSupDataPreprocessor``: mean, std, to_rgb, ...

    Raises:
        ValueError: If a range is reversed or not positive, ``patch_size`` is not positive,
            ``photometry`` has other transforms or comes without ``to_rgb``, or, at the first
            batch, it does not fit the number of views, the geometry records are missing or the
            image size is not a multiple of ``patch_size``.
    """

    def __init__(
        self,
        scale: Interval = (0.7, 1.3),
        aspect_ratio: Interval = (3 / 4, 4 / 3),
        patch_size: Positive = 16,
        photometry: Sequence[list[ModuleCfg]] | None = None,
        non_blocking: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(non_blocking=non_blocking, **kwargs)
        self.scale = tuple(scale)
        self.aspect_ratio = tuple(aspect_ratio)
        if photometry and not self._channel_conversion:
            raise ValueError(
                'SERDataPreprocessor: photometry works on RGB images; set to_rgb=True, as '
                'pipelines load them in BGR order.'
            )
        self.patch_size = patch_size
        self.photometry = [Photometry(x) for x in photometry] if photometry else None

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
        if isinstance(data['inputs'], Tensor):
            return super().forward(data, training)
        *views, record = data['inputs']
        draws = views.pop() if views and getattr(views[-1], 'ndim', 0) == 3 else None
        self._check(views, record)

        # The record is read on the host, where it was made: the step never waits for the device.
        in_b2 = record[:, 0] >= 0
        sizes = [len(in_b2) - int(in_b2.sum()), int(in_b2.sum())]
        order = in_b2.sort(stable=True).indices
        samples = data.get('data_samples')
        samples = samples and [samples[i] for i in order.tolist()]
        views, samples, order, elements, draws = self.cast_data(
            [views, samples, order, record[in_b2], draws]
        )
        photometry: Sequence[Photometry | None] = self.photometry or [None] * len(views)
        inputs = [
            self._normalize(view[order], change)
            for view, change in zip(views, photometry, strict=True)
        ]
        for v, view in enumerate(inputs[: record.shape[1]]):
            base, equi = view.split(sizes)
            inputs[v] = ViewBatch(base, self._resize(equi), elements[:, v])
            inputs[v].draws = draws if draws is None else draws[order, v]
        return dict(inputs=inputs, data_samples=samples)

    def _normalize(self, images: Tensor, photometry: Photometry | None) -> Tensor:
        """As the base class, but without sending the device a list, the order of the channels."""
        images = (images.flip(1) if self._channel_conversion else images).float()
        images = photometry(images) if photometry else images
        return (images - self.mean) / self.std if self._enable_normalize else images

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
            height, width = view.shape[-2:]
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(
                    f'SERDataPreprocessor: images of {height} x {width} are not whole patches of '
                    f'patch_size={self.patch_size}; change the crop size of the views or '
                    'patch_size.'
                )

    def _resize(self, images: Tensor) -> Tensor:
        """Resize (N2, 3, H, W) to a grid of tokens drawn for this batch and view."""
        if not len(images):
            return images  # and draw nothing, so that the base algorithm draws what it would alone
        base = [side / self.patch_size for side in images.shape[-2:]]
        grid = draw_grid(base, self.scale, self.aspect_ratio)
        size = [side * self.patch_size for side in grid]
        return F.interpolate(images, size, mode='bicubic', align_corners=False)
