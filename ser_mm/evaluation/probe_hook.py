from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ser_mm.arguments import Natural, Positive, checked, filled
from ser_mm.evaluation.data import build_loader, check_evaluation, spaced_indices
from ser_mm.evaluation.features import vectors_of
from ser_mm.evaluation.knn import knn_probe
from ser_mm.evaluation.linear import fit_classifier
from ser_mm.evaluation.metrics import rank_me
from ser_mm.evaluation.reading import read_batches, refuse

Measure = Literal['knn', 'linear', 'rankme']
MEASURES: tuple[Measure, ...] = ('knn', 'linear', 'rankme')


@HOOKS.register_module()
@checked
class ProbeHook(Hook):
    """Log k-NN, a linear probe and RankMe of the backbone in training, on labelled images.

    The images are those of ``evaluation`` of the run's config, at equal distances in its data sets.
    All ranks extract features, each of its share, and the first measures and logs, to the log file
    and the visualizer, as ``probe/knn``, ``probe/linear`` and ``probe/rankme``. The run is not
    changed: the network is put back as it was, and random numbers go on as without the hook, after
    ``before_train``. Nothing is to be resumed.

    Figures while training are of few images and serve for watching; results are those of
    ``ser-mm probe``.

    Args:
        train_images (int): Images of ``evaluation.train`` that the probes learn from, at most.
            Defaults to 5000.
        val_images (int): Images of ``evaluation.val``, at most. Defaults to 1000.
        interval (int): Epochs between two figures. Defaults to 1.
        measures (Sequence[str]): Of 'knn' (see :func:`~ser_mm.evaluation.knn_probe`), 'linear'
            (logistic regression, see :func:`~ser_mm.evaluation.linear.fit_classifier`) and 'rankme'
            (of the validation images, see :func:`~ser_mm.evaluation.metrics.rank_me`). Defaults to
            all.
        batch_size (int): Images of a rank at one time. Defaults to 256.
        num_workers (int): Processes that read images, of each rank. Defaults to 0.

    Raises:
        FileNotFoundError: If the data is missing when training begins.
        ValueError: If it has no labels, or an image cannot be read.

    Example:
        >>> custom_hooks = [*_base_.custom_hooks, dict(type='ProbeHook', interval=5)]
    """

    priority = 'LOW'

    def __init__(
        self,
        train_images: Positive = 5000,
        val_images: Positive = 1000,
        interval: Positive = 1,
        measures: Annotated[Sequence[Measure], filled] = MEASURES,
        batch_size: Positive = 256,
        num_workers: Natural = 0,
    ) -> None:
        self.images = dict(train=train_images, val=val_images)
        self.interval = interval
        self.measures = tuple(measures)
        self.batch_size, self.num_workers = batch_size, num_workers

    def before_train(self, runner: Runner) -> None:
        """Check the data, and list its images on all ranks: to build a set may need all of them."""
        splits = ['train', 'val'] if {'knn', 'linear'} & set(self.measures) else ['val']
        check_evaluation(runner.cfg, splits)
        self._loaders = {
            split: build_loader(runner.cfg, split, self.batch_size, self.num_workers)
            for split in splits
        }

    def after_train_epoch(self, runner: Runner) -> None:
        """Extract, measure and log."""
        if not self.every_n_epochs(runner, self.interval):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = model.backbone
        modes = [(module, module.training) for module in backbone.modules()]
        with torch.random.fork_rng(devices=[]):  # a loader draws when it starts
            try:
                backbone.eval()
                sets = {
                    split: _extract(backbone, *made, split, self.images[split], self.batch_size)
                    for split, made in self._loaders.items()
                }
            finally:
                for module, training in modes:
                    module.training = training
        if get_dist_info()[0]:
            return
        found = self._measure(sets)
        scalars = {f'probe/{name}': value for name, value in found.items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter)
        told = ', '.join(f'{name} {value:.4f}' for name, value in found.items())
        runner.logger.info(f'Probe of {len(sets["val"][1])} validation images: {told}')

    def _measure(self, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        found = {}
        val, labels = sets['val']
        if 'knn' in self.measures:
            found['knn'] = knn_probe(*sets['train'], val, labels)
        if 'linear' in self.measures:
            classify = fit_classifier(*sets['train'])
            found['linear'] = float((classify(val) == labels).double().mean())
        if 'rankme' in self.measures:
            found['rankme'] = rank_me(val)
        return found


@torch.no_grad()
def _extract(
    backbone: nn.Module,
    preprocessor: nn.Module,
    loader: DataLoader,
    split: str,
    count: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Features (N, C) and labels (N,) of images at equal distances, on all ranks the same."""
    rank, world_size = get_dist_info()
    chosen = spaced_indices(len(loader.dataset), count)
    rows: dict[int, tuple[Tensor, int]] = {}
    unreadable = []
    for batch in read_batches(loader, chosen[rank::world_size], batch_size):
        unreadable += batch.unreadable
        if batch.content is not None:
            made = preprocessor(batch.content)
            vectors = vectors_of(backbone, backbone(made['inputs'])).float().cpu()
            labels = [int(sample.gt_label) for sample in made['data_samples']]
            rows |= dict(zip(batch.indices, zip(vectors, labels, strict=True), strict=True))
    gathered = all_gather_object((rows, unreadable))
    refuse(split, [x for _, some in gathered for x in some], len(chosen))
    rows = {index: row for own, _ in gathered for index, row in own.items()}
    features, labels = zip(*(rows[index] for index in chosen), strict=True)
    return torch.stack(features), torch.tensor(labels)
