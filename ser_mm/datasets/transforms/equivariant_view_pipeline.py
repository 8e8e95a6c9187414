from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Annotated

import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import ModuleCfg, Positive, Share, checked, filled
from ser_mm.datasets.transforms.fast_multi_view import results_for
from ser_mm.datasets.transforms.policy import derive_crop, derive_photometry, find_geometry
from ser_mm.datasets.transforms.recording import RecordedView, random_numbers_apart
from ser_mm.geometry import NUM_ELEMENTS, act_on_array

NOT_IN_B2 = -1
"""Stands in the geometry record of an image of b1."""
NOT_ASSIGNED = -2
"""Stands in that of an image of which nobody said whether it is in b1 or b2."""

Pipeline = Sequence[ModuleCfg | Callable]


@TRANSFORMS.register_module()
@checked
class EquivariantViewPipeline(BaseTransform):
    """Make the views of an image: by the base policy for b1, or equivariant ones for b2.

    In a run, ``round(equi_ratio * B)`` images of each global batch of B join b2, see
    :class:`~ser_mm.datasets.ExactSplit`; an image that was not assigned by it is in b1, and marked,
    unless ``equi_ratio`` is 0 or 1. The views of b1 come from ``views``, as with MMPretrain's
    ``MultiView``. The views of b2 come from one crop, ``equi_crop``, shared by both:
    each view then has its own photometry, ``equi_views``, and its own element of D4, drawn
    uniformly and applied without loss. The resize that completes the group element is drawn once
    per batch, by :class:`~ser_mm.models.SERDataPreprocessor` (paper, Section 3).

    **Required Keys:** img

    **Modified Keys:** img, a list of the views followed by the geometry record: an int64 tensor
    (number of equivariant views,) with the element that moved each of them, -1 in b1, -2 in b1
    where it was not assigned. With ``record_draws``, what was drawn for the first two views stands
    before it: float32, (2, 18), see :mod:`ser_mm.draws`. Both travel with the images through
    ``PackInputs`` and ``default_collate``.

    Args:
        views (Sequence[list]): Pipeline of each view of b1. All views have the same size, but for
            further ones beyond the first two (local crops), which b2 gets as b1 does. MultiView's
            arguments do as well: ``transforms`` with ``num_views``.
        equi_crop (list, optional): Pipeline that crops an image of b2, to the size of ``views``,
            square; ``[]`` for images that are so already. Defaults to None: the crop that the
            first two of ``views`` begin with.
        equi_views (Sequence[list], optional): Photometric pipeline of each view of b2; two of them.
            Leave photometry out of these and of ``views`` to have it done on the device, by
            ``photometry`` of :class:`~ser_mm.models.SERDataPreprocessor`. Defaults to None: the
            first two of ``views`` without crop and flip.
        equi_ratio (float): Share of the images of a batch in b2, 0 to 1. Defaults to 0.01.
        transforms (Sequence[list], optional): Another name of ``views``. Defaults to None.
        num_views (int | Sequence[int], optional): How often each of ``transforms`` is a view.
            Defaults to None: once.
        record_draws (bool): Record what is drawn for the first two views, for
            :class:`~ser_mm.models.AugSelfHead` and :class:`~ser_mm.models.EquiModHead`. Needs
            ``equi_ratio=0``, as the element of b2 has no place in that record. Defaults to False.
        pair_draws (bool): Let images 2i and 2i + 1 of a batch share their crop, jitter and
            grayscale in each of the first two views, for :class:`~ser_mm.models.STLHead`. Needs
            ``equi_ratio=0``. Defaults to False.
        extra_views (Sequence[list]): Pipelines of further views, after all others, which draw from
            a stream of their own: the views before are those that they would be without. Defaults
            to none.

    Raises:
        ValueError: If an argument is of another type, there are fewer than two views, the policy
            of b2 cannot be derived, ``equi_views`` move the content of an image, draws are recorded
            or shared beside b2, or those of a transform cannot be; when images
            are read, if those of a batch differ in size, or ``equi_crop`` gives one that is not
            square.

    Example:
        >>> crop = dict(type='RandomResizedCrop', scale=224)
        >>> view = [crop, dict(type='Solarize', thr=128), dict(type='RandomFlip', prob=0.5)]
        >>> pipeline = dict(type='EquivariantViewPipeline', views=[view, view], equi_ratio=0.01)
    """

    def __init__(
        self,
        views: Sequence[Pipeline] | None = None,
        equi_crop: Pipeline | ModuleCfg | None = None,
        equi_views: Sequence[Pipeline] | None = None,
        equi_ratio: Share = 0.01,
        transforms: Sequence[Pipeline] | None = None,
        num_views: Positive | Annotated[Sequence[Positive], filled] | None = None,
        record_draws: bool = False,
        pair_draws: bool = False,
        extra_views: Sequence[Pipeline] = (),
    ) -> None:
        views = _expand(views, transforms, num_views)
        if len(views) < 2 or (equi_views is not None and len(equi_views) != 2):
            raise ValueError(
                f'EquivariantViewPipeline: got {2 if equi_views is None else len(equi_views)} '
                f'equi_views and {len(views)} views; give two equi_views, and as many views or '
                'more.'
            )
        drawn = record_draws or pair_draws
        if drawn and equi_ratio > 0:
            name = 'record_draws' if record_draws else 'pair_draws'
            raise ValueError(
                f'EquivariantViewPipeline: {name}=True knows nothing of the draws of b2, and '
                f'equi_ratio={equi_ratio:g}; set equi_ratio=0.'
            )
        if equi_views is None:
            equi_views = [[], []] if drawn else derive_photometry(views[:2])
        if equi_crop is None:
            equi_crop = [] if drawn else derive_crop(views[:2])
        moving = next((name for view in equi_views for name in find_geometry(view)), None)
        if moving:
            raise ValueError(
                f'EquivariantViewPipeline: {moving} in equi_views moves the content of an image, '
                'of which the geometry record would not know; move it to equi_crop, or leave it '
                'out, as each view of b2 is turned and flipped anyway.'
            )
        composed = [Compose(view) for view in views]
        self.views = [
            RecordedView(view) if drawn and v < 2 else view for v, view in enumerate(composed)
        ]
        self.extra_views = [Compose(view) for view in extra_views]
        self.record_draws = record_draws
        self.pair_draws = pair_draws
        self.equi_crop = Compose(equi_crop)
        self.equi_views = [Compose(view) for view in equi_views]
        self.equi_ratio = equi_ratio
        self.in_b2: bool | None = None
        """Where the next image belongs; None where nobody says."""
        self.as_before: bool | None = None
        """Whether the next image shares the draws of the last; None where nobody says."""
        self.sizes: dict[int, str] | None = None
        """Size that each view has in this batch; None where images make no batch."""

    def transform(self, results: dict) -> dict:
        """Make the views of one image.

        Args:
            results (dict): With ``img`` of shape (H, W, 3), uint8.

        Returns:
            dict: With ``img`` as described above.
        """
        # Without b2 no random number is drawn beyond those of MultiView, so that the same seed
        # gives the same views.
        assigned = self.in_b2 is not None or self.equi_ratio in (0, 1)
        if self.pair_draws:
            assigned = self.as_before is not None
        in_b2 = self.equi_ratio == 1 if self.in_b2 is None else self.in_b2
        record = np.full(len(self.equi_views), NOT_IN_B2 if assigned else NOT_ASSIGNED)
        images = []
        if in_b2:
            crop = self.equi_crop(results_for(self.equi_crop, results))
            height, width = crop['img'].shape[:2]
            if height != width:
                raise ValueError(
                    f'EquivariantViewPipeline: equi_crop gave an image of {height} x {width}; '
                    'quarter turns need a square one, end it with a crop or resize to one number.'
                )
            record = np.random.randint(NUM_ELEMENTS, size=len(self.equi_views))
            images = [
                act_on_array(view(deepcopy(crop))['img'], element)
                for view, element in zip(self.equi_views, record, strict=True)
            ]
        draws = []
        for view in self.views[len(images) :]:
            if isinstance(view, RecordedView):
                made, row = view(results_for(view, results), bool(self.as_before))
                draws.append(row)
            else:
                made = view(results_for(view, results))
            images.append(made['img'])
        if self.extra_views:
            with random_numbers_apart():
                images += [view(results_for(view, results))['img'] for view in self.extra_views]
        self._compare(images, bool(in_b2))
        records = [torch.from_numpy(np.stack(draws))] if self.record_draws else []
        results['img'] = [*images, *records, torch.from_numpy(record)]
        return results

    def _compare(self, images: list[np.ndarray], in_b2: bool) -> None:
        """Refuse an image that cannot be in one batch with those before."""
        if self.sizes is None:
            return
        for v, image in enumerate(images):
            size = ' x '.join(map(str, image.shape[:2]))
            before = self.sizes.setdefault(v, size)
            if size != before:
                own = in_b2 and v < len(self.equi_views)
                place = f'equi_crop with equi_views[{v}]' if own else f'views[{v}]'
                if v >= len(self.views):
                    place = f'extra_views[{v - len(self.views)}]'
                raise ValueError(
                    f'EquivariantViewPipeline: {place} gives an image of {size}, others of the '
                    f'same view are {before}; crop or resize to one size in views and equi_crop.'
                )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(equi_ratio={self.equi_ratio}, views={self.views}, '
            f'equi_crop={self.equi_crop}, equi_views={self.equi_views})'
        )


def _expand(
    views: Sequence[Pipeline] | None,
    transforms: Sequence[Pipeline] | None,
    num_views: int | Sequence[int] | None,
) -> list[Pipeline]:
    """One pipeline per view, from ``views`` or from MultiView's arguments."""
    if (views is None) == (transforms is None):
        raise ValueError(
            'EquivariantViewPipeline: give either views=[...], the pipeline of each view, or '
            "MultiView's transforms=[...] with num_views."
        )
    pipelines = list(views or transforms or [])
    counts = [1] * len(pipelines) if num_views is None else np.atleast_1d(num_views).tolist()
    if len(counts) != len(pipelines):
        raise ValueError(
            f'EquivariantViewPipeline: num_views={num_views} has {len(counts)} numbers for '
            f'{len(pipelines)} pipelines; give one for each.'
        )
    return [pipeline for pipeline, n in zip(pipelines, counts, strict=True) for _ in range(n)]
