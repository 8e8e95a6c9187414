from collections.abc import Sequence
from typing import Annotated

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from ser_mm.arguments import Name, Positive, checked, filled
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.data import spaced_images
from ser_mm.evaluation.equivariance import check_transformations, equivariance_by_layer


@HOOKS.register_module()
@checked
class EquivarianceHook(Hook):
    """Log how equivariant the token map of every layer is, on a few images, during training.

    Of each layer, R2 and token retrieval go to the log file and the visualizer as
    ``equivariance/<transformation>/<r2 or retrieval>_<layer>``; see
    :func:`~ser_mm.evaluation.equivariance.equivariance_by_layer`. The run is not changed: the
    network is put back as it was, and no random number is drawn but in ``before_train``.

    Args:
        num_images (int): Images, at equal distances in the data set. Defaults to 64.
        split (str): Data set, a key of ``evaluation`` of the run's config. Defaults to 'val'.
        interval (int): Epochs between two scores. Defaults to 1.
        transformations (Sequence[str]): See ``ser_mm.evaluation.equivariance.TRANSFORMATIONS``.
            Defaults to ('mixture', ).
    """

    priority = 'LOW'

    def __init__(
        self,
        num_images: Positive = 64,
        split: Name = 'val',
        interval: Positive = 1,
        transformations: Annotated[Sequence[Name], filled] = ('mixture',),
    ) -> None:
        check_transformations(transformations)
        self.num_images = num_images
        self.split = split
        self.interval = interval
        self.transformations = tuple(transformations)

    def before_train(self, runner: Runner) -> None:
        """Read the images once, on all ranks: to build a data set may need all of them."""
        self._batches = list(spaced_images(runner.cfg, self.split, self.num_images))
        self._score(runner, [self._batches[0][:1]])  # what cannot be scored fails before training

    def _score(
        self, runner: Runner, batches: list[torch.Tensor]
    ) -> dict[str, list[dict[str, float]]]:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        with token_maps_of(model.backbone) as token_maps:
            return equivariance_by_layer(token_maps, batches, self.transformations)

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        """Score and log."""
        if not self.every_n_epochs(runner, self.interval):
            return
        scores = self._score(runner, self._batches)
        scalars = {
            f'equivariance/{name}/{key}_{i + 1}': layer[key]
            for name, layers in scores.items()
            for i, layer in enumerate(layers)
            for key in ('r2', 'retrieval')
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter)
        for name, layers in scores.items():
            for key in ('r2', 'retrieval'):
                values = ', '.join(f'{layer[key]:.3f}' for layer in layers)
                runner.logger.info(f'Equivariance, {name}, {key} by layer: {values}')
