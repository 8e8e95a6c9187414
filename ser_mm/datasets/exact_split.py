"""The split of each mini-batch into b1 and b2, with the same number of images in every step."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ser_mm.datasets.transforms import EquivariantViewPipeline
from ser_mm.views import check_b2, count_b2, count_b2_of_rank


class ExactSplit:
    """Reads a batch from a data set and assigns its images to b1 and b2 (paper, Section 3).

    Of a global batch of B images, ``round(equi_ratio * B)`` are in b2, dealt over the ranks to
    within one; of a last, smaller batch at least two. Which ones is drawn from the seed, the epoch
    and the images of the batch, so it depends neither on workers nor on what was trained before.

    Attributes:
        epoch (int): To be set at the start of each, so that a sampler that repeats its batches has
            others of their images in b2.

    It takes the place of ``dataset.__getitems__``, by which torch's loaders read whole batches.

    Args:
        dataset (Dataset): With images by index, through ``pipelines``.
        pipelines (Sequence[EquivariantViewPipeline]): Those in the data set, of one ``equi_ratio``.
        seed (int): Seed of the draw. Defaults to 0.
        rank (int): This process. Defaults to 0.
        world_size (int): Processes that share a global batch. Defaults to 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        pipelines: Sequence[EquivariantViewPipeline],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.pipelines = pipelines
        self.equi_ratio = pipelines[0].equi_ratio
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = torch.zeros((), dtype=torch.int64, device='cpu')

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def count(self, batch_size: int) -> int:
        """Images of b2 in a global batch, from the batch size of a rank."""
        return count_b2(self.equi_ratio, batch_size * self.world_size)

    def places(self, indices: Sequence[int]) -> set[int]:
        """Which images of this rank's batch are in b2, by their places in it."""
        own = count_b2_of_rank(self.equi_ratio, len(indices), self.rank, self.world_size)
        if not own:
            return set()
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, *map(int, indices)])
        return set(rng.choice(len(indices), own, replace=False).tolist())

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """Samples of a batch, in the order of ``indices``."""
        places = self.places(indices)
        samples = []
        for pipeline in self.pipelines:
            pipeline.sizes = {}
        try:
            for place, index in enumerate(indices):
                for pipeline in self.pipelines:
                    pipeline.in_b2 = place in places
                samples.append(self.dataset[index])
        finally:
            for pipeline in self.pipelines:
                pipeline.in_b2 = pipeline.sizes = None
        return samples


def split_batches(
    loader: DataLoader, seed: int = 0, rank: int = 0, world_size: int = 1
) -> ExactSplit | None:
    """Let a loader assign the images of its batches to b1 and b2.

    Args:
        loader (DataLoader): Its workers must not have started yet; changed in place.
        seed (int): See :class:`ExactSplit`. Defaults to 0.
        rank (int): See :class:`ExactSplit`. Defaults to 0.
        world_size (int): See :class:`ExactSplit`. Defaults to 1.

    Returns:
        ExactSplit | None: None, and nothing is changed, where no pipeline has images in b2.

    Raises:
        ValueError: If pipelines in the data set differ in ``equi_ratio``, or a global batch is too
            small for two images in b2.
    """
    pipelines = list(view_pipelines(loader.dataset))
    ratios = sorted({pipeline.equi_ratio for pipeline in pipelines})
    if not any(ratios):
        return None
    if len(ratios) > 1:
        raise ValueError(
            f'EquivariantViewPipeline: the data sets of a run have equi_ratio={ratios}; give all '
            'the same.'
        )
    split = ExactSplit(loader.dataset, pipelines, seed, rank, world_size)
    check_b2('EquivariantViewPipeline', split.equi_ratio, batch_size_of(loader) * world_size)
    if loader.num_workers:  # of those that stay for all epochs each has a copy of the rest
        split._epoch.share_memory_()
    loader.dataset.__getitems__ = split
    return split


def batch_size_of(loader: DataLoader) -> int:
    """Images per batch of a rank; 0 where a batch sampler of its own does not tell."""
    return loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 0


def view_pipelines(dataset: Any) -> Iterator[EquivariantViewPipeline]:
    """The view pipelines of a data set, through wrappers and concatenations."""
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    yield from (x for x in transforms if isinstance(x, EquivariantViewPipeline))
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]
    for part in inner:
        if part is not None:
            yield from view_pipelines(part)
