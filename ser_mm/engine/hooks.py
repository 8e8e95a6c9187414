"""Hooks that make a run repeatable, freeze a layer and stop a run that diverged."""

import random
from collections.abc import Iterable

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmpretrain.models import CosineEMA
from mmpretrain.registry import HOOKS
from torch import nn
from torch.utils.data import DataLoader

from ser_mm.arguments import Name, Natural, Positive, checked
from ser_mm.datasets import EquivariantViewPipeline, pair_batches, split_batches
from ser_mm.datasets.exact_split import batch_size_of, view_pipelines
from ser_mm.views import check_b2, count_b2


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Start every epoch from random states that depend on seed, epoch and rank alone.

    A run that is killed and resumed then continues as the uninterrupted one did. The workers of
    the data loader follow if they are started anew each epoch (``persistent_workers=False``) with
    ``worker_init_fn=dict(type='keep_worker_seed')``: MMEngine's own gives a worker the same seed
    in every epoch.

    A loop by iteration has one epoch only. There each iteration starts so, such that a resumed run
    does not repeat the draws of the first ones.

    For schedules in epochs, as of :class:`~ser_mm.models.DINOHead`, it writes the iterations that
    an epoch has into MMEngine's ``MessageHub``, as ``epoch_length``.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Tell how long an epoch is."""
        runner.message_hub.update_info('epoch_length', steps_per_epoch(runner))

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed Python, NumPy and torch."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            # Apart from the seeds of the iterations; not 0 again where a run is resumed.
            _seed(runner.seed, runner.iter, get_rank(), 1)
        else:
            _seed(runner.seed, runner.epoch, get_rank())

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Seed them in a loop by iteration."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            _seed(runner.seed, runner.iter, get_rank(), 0)


def _seed(*entropy: int) -> None:
    states = np.random.SeedSequence(entropy).generate_state(3)
    python, numpy, pytorch = (int(state) for state in states)
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


def steps_per_epoch(runner: Runner) -> int:
    """Iterations in which a run sees as many images as its data set has.

    Args:
        runner (Runner): With a data loader of ``torch``.

    Returns:
        int: At least 1; also of a loop by iteration, whose sampler does not end.
    """
    loader = runner.train_dataloader
    if isinstance(loader.sampler, InfiniteSampler):
        batch = batch_size_of(loader) or 1
        return max(1, len(loader.dataset) // (batch * get_world_size()))
    return max(1, len(loader))


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """``worker_init_fn`` that keeps the seeds of a worker.

    torch derives those of Python, NumPy and torch from the random state of the process that
    starts the worker, so from that of :class:`EpochSeedHook`.

    Args:
        worker_id (int): Number of the worker, unused.
    """


@HOOKS.register_module()
class EquivariantSplitHook(Hook):
    """Let every batch have as many images in b2, or pairs, as its view pipeline says.

    See :class:`~ser_mm.datasets.ExactSplit` and :class:`~ser_mm.datasets.PairedDraws`. Without an
    :class:`~ser_mm.datasets.EquivariantViewPipeline` it does nothing; where the views are made by
    :class:`~ser_mm.models.SERDataPreprocessor`, that divides the batches, and here they are
    checked.

    Where there is a b2, attention does not run by cuDNN from then on. cuDNN plans for each number
    of tokens, and b2 has another in almost every batch: on an H200, steps of a ViT-S/16 with grids
    not seen before took 3.2 times as long as with it off, and those with grids seen before no less
    (``benchmarks/gpu.py --parts grids``, with ``--no-cudnn-attention`` and without).
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Prepare the loader, and log how many images are in b2.

        Raises:
            ValueError: If a batch is too small, or the pipeline does not make what the head of an
                :class:`~ser_mm.models.EquivarianceAlgorithm` needs.
        """
        loader = runner.train_dataloader
        _check_views_of_head(runner.model, view_pipelines(loader.dataset))
        pair_batches(loader)
        check_device_views(runner.model, loader)
        self._split = split_batches(loader, runner.seed, get_rank(), get_world_size())
        ratio = self._split.equi_ratio if self._split else ratio_on_device(runner.model)
        images = batch_size_of(loader) * get_world_size()
        if ratio and images:
            torch.backends.cuda.enable_cudnn_sdp(False)
            runner.logger.info(
                f'b2 has {count_b2(ratio, images)} of the {images} images of a batch '
                f'(equi_ratio={ratio:g}), dealt over {get_world_size()} rank(s).'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Let a sampler that repeats its batches have others of their images in b2."""
        if self._split is not None:
            self._split.epoch = runner.epoch


def ratio_on_device(model: nn.Module) -> float:
    """Share of b2 in the views that the preprocessor of a model makes; 0 if it makes none.

    Args:
        model (nn.Module): A model of MMEngine, wrapped for several ranks or not.
    """
    preprocessor = getattr(getattr(model, 'module', model), 'data_preprocessor', None)
    return getattr(preprocessor, 'equi_ratio', None) or 0.0


def check_device_views(model: nn.Module, loader: DataLoader) -> None:
    """Refuse data that a preprocessor cannot make its views of.

    Args:
        model (nn.Module): See :func:`ratio_on_device`.
        loader (DataLoader): Of its training images.

    Raises:
        ValueError: If the data set makes views, too, or a global batch is too small for two images
            in b2.
    """
    preprocessor = getattr(getattr(model, 'module', model), 'data_preprocessor', None)
    if getattr(preprocessor, 'views', None) and any(view_pipelines(loader.dataset)):
        raise ValueError(
            'SERDataPreprocessor: views are made here, and by EquivariantViewPipeline in the data '
            'set, too; leave that out of its pipeline, or views and equi_ratio out of '
            'data_preprocessor.'
        )
    images = batch_size_of(loader) * get_world_size()
    check_b2('SERDataPreprocessor', ratio_on_device(model), images)


def _check_views_of_head(model: nn.Module, pipelines: Iterable[EquivariantViewPipeline]) -> None:
    """Refuse views that the head of an EquivarianceAlgorithm would take for others."""
    model = getattr(model, 'module', model)
    head = getattr(model, 'equi_head', None)
    name = type(model if head is None else head).__name__
    needed = dict(extra_views=getattr(head, 'extra_views', 0))
    if head is not None:
        needed.update(record_draws=head.needs_draws, pair_draws=head.needs_pairs)
    for pipeline in pipelines:
        given = dict(
            extra_views=len(pipeline.extra_views),
            record_draws=pipeline.record_draws,
            pair_draws=pipeline.pair_draws,
        )
        for field, value in needed.items():
            if given[field] != value and (field != 'record_draws' or value):
                count = field == 'extra_views'
                raise ValueError(
                    f'EquivariantViewPipeline: {field}{" has" if count else "="}'
                    f'{f" {given[field]} entries" if count else given[field]}, but {name} needs '
                    f'{value}; {"give as many" if count else f"set {field}={value}"}.'
                )


@HOOKS.register_module()
class MomentumUpdateHook(Hook):
    """Move the momentum branch once per optimizer step, also where gradients are accumulated.

    MMPretrain's algorithms move it in each forward pass. With ``accumulative_counts=k`` of the
    optimizer wrapper, k passes make a step, and the branch would move k times towards the same
    weights.
    """

    def before_train(self, runner: Runner) -> None:
        """Tell the moving averages of the model how many passes make a step."""
        count = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        for module in runner.model.modules():
            if isinstance(module, CosineEMA) and module.interval == 1:
                module.interval = count


@HOOKS.register_module()
@checked
class FreezeLayerHook(Hook):
    """Leave a layer as it is in the first epochs, as DINO does with the last of its projector.

    The optimizer finds no gradient of it and skips it, weight decay included. Gradients are
    computed all the same: DDP, built once for all epochs, waits for each.

    Args:
        layer (str): Name of the layer, or the end of its name as in 'neck.last_layer', so that it
            is found in a wrapped model too.
        epochs (int): Number of epochs, 0 or more. Defaults to 1.

    Raises:
        ValueError: Before training, if no parameter to train is in such a layer.
    """

    def __init__(self, layer: Name, epochs: Natural = 1) -> None:
        self.layer = layer
        self.epochs = epochs

    def before_train(self, runner: Runner) -> None:
        """Have the gradients dropped right before each step of the optimizer."""
        frozen = [
            parameter
            for name, parameter in runner.model.named_parameters()
            if f'.{self.layer}.' in f'.{name}' and parameter.requires_grad
        ]
        if not frozen:
            raise ValueError(
                f"FreezeLayerHook: no parameter to train is in layer='{self.layer}' of the model; "
                'name a layer as model.named_modules() does.'
            )

        steps = self.epochs * steps_per_epoch(runner)

        def drop_gradients(*_) -> None:
            if runner.iter < steps:
                for parameter in frozen:
                    parameter.grad = None

        self._handle = runner.optim_wrapper.optimizer.register_step_pre_hook(drop_gradients)

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()


@HOOKS.register_module()
@checked
class NonFiniteLossHook(Hook):
    """Stop training when a loss is not finite, before a checkpoint of it is written.

    Losses are checked every ``interval`` iterations, so that the device is not waited for in
    between, and at the end of each epoch. Use a checkpoint interval in iterations that is a
    multiple of it.

    Args:
        interval (int): Iterations between two checks. Defaults to 50.
    """

    priority = 'VERY_HIGH'

    def __init__(self, interval: Positive = 50) -> None:
        self.interval = interval
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []

    def before_train_epoch(self, runner: Runner) -> None:
        """Forget losses of an epoch that was left early."""
        self._pending = []

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Collect the losses of an iteration, and look at those collected.

        Raises:
            FloatingPointError: With the first iteration whose loss is not finite, and its terms.
        """
        # Detached, as a loss would keep the graph of its step alive.
        terms = {name: value.detach() for name, value in (outputs or {}).items()}
        self._pending.append((runner.iter + 1, terms))
        if not (
            self.every_n_train_iters(runner, self.interval)
            or self.is_last_train_iter(runner)
            or self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):
            return
        losses = torch.stack([terms['loss'] for _, terms in self._pending])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            iteration, terms = self._pending[bad[0]]
            values = ', '.join(f'{name}={float(value):g}' for name, value in terms.items())
            raise FloatingPointError(
                f'The loss is not finite at iteration {iteration}: {values}. Training stops; '
                'checkpoints written before stay. Lower the learning rate, lengthen the warm-up, '
                "clip gradients or, in float16, set optim_wrapper.dtype='bfloat16', and resume."
            )
        self._pending = []
