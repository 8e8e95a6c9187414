"""Batches whose images share their draws two by two, as STL asks for."""

from collections.abc import Sequence
from typing import Any

from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader, Dataset

from ser_mm.datasets.exact_split import batch_size_of, view_pipelines
from ser_mm.datasets.transforms import EquivariantViewPipeline


class PairedDraws:
    """Reads a batch in which image 2i + 1 is cropped, jittered and greyed as image 2i is.

    In each view by the same draws (STL, arXiv 2501.08712, Section 3.3). It takes the place of
    ``dataset.__getitems__``, by which torch's loaders read whole batches, so a pair never straddles
    batches, ranks or workers.

    Args:
        dataset (Dataset): With images by index, through ``pipelines``.
        pipelines (Sequence[EquivariantViewPipeline]): Those in the data set.
    """

    def __init__(self, dataset: Dataset, pipelines: Sequence[EquivariantViewPipeline]) -> None:
        self.dataset = dataset
        self.pipelines = pipelines

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """Samples of a batch, in the order of ``indices``.

        Raises:
            ValueError: If their number is odd.
        """
        _check_even(len(indices))
        samples = []
        try:
            for place, index in enumerate(indices):
                for pipeline in self.pipelines:
                    pipeline.as_before = place % 2 == 1
                samples.append(self.dataset[index])
        finally:
            for pipeline in self.pipelines:
                pipeline.as_before = None
        return samples


def pair_batches(loader: DataLoader) -> PairedDraws | None:
    """Let a loader read batches whose images share their draws two by two.

    Args:
        loader (DataLoader): Its workers must not have started yet; changed in place.

    Returns:
        PairedDraws | None: None, and nothing is changed, where no pipeline has ``pair_draws``.

    Raises:
        ValueError: If a batch has an odd number of images, or pipelines in the data set make other
            views of them.
    """
    pipelines = [x for x in view_pipelines(loader.dataset) if x.pair_draws]
    if not pipelines:
        return None
    _check_even(batch_size_of(loader))
    sampler = loader.sampler
    endless = isinstance(sampler, InfiniteSampler)  # its length is of the data set
    if not (loader.drop_last or endless) and hasattr(sampler, '__len__'):
        _check_even(len(sampler) % (batch_size_of(loader) or 1))
    # Images of a pair may come from two data sets of one, so draws are kept in one place.
    for pipeline in pipelines:
        if str(pipeline.views) != str(pipelines[0].views):
            raise ValueError(
                'EquivariantViewPipeline: pair_draws=True, but the data sets of a run differ in '
                'views, and a pair may be of two of them; give all the same.'
            )
        pipeline.views = pipelines[0].views
    loader.dataset.__getitems__ = PairedDraws(loader.dataset, pipelines)
    return loader.dataset.__getitems__


def _check_even(images: int) -> None:
    if images % 2:
        raise ValueError(
            f'EquivariantViewPipeline: pair_draws=True, but a batch of {images} images is not made '
            'of pairs; choose an even batch_size, and drop_last=True.'
        )
