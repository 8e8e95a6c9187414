"""What a training step costs: counts that no machine changes, and, where it can run, its time."""

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ser_mm.datasets.transforms import EquivariantViewPipeline
from ser_mm.datasets.transforms.equivariant_view_pipeline import NOT_IN_B2
from ser_mm.draws import NUM_DRAWS
from ser_mm.engine.cpu import adapt_to_device
from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.results import make_table
from ser_mm.geometry import NUM_ELEMENTS
from ser_mm.models.two_view_wrapper import TwoViewWrapper
from ser_mm.views import ViewBatch

# Operators that only describe a tensor anew, and launch nothing.
_METADATA = set(
    'alias as_strided detach device diagonal empty empty_like empty_strided expand lift_fresh '
    'new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose '
    'unbind unfold unsqueeze view _reshape_alias _unsafe_view'.split()
)

_PLAIN = (
    224,
    224,
)  # images that a preprocessor makes views of, which do not change the size of these


def _flop_counter() -> FlopCounterMode:
    """Counter of torch, which here knows the CPU's attention as it knows the GPU's kernels."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v))
    if backward not in flop_registry:
        register_flop_formula(backward)(
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        )
    return FlopCounterMode(display=False)


class OperatorCounter(TorchDispatchMode):
    """Count the operators that launch work: on a GPU, kernels or groups of them.

    Attributes:
        counts (Counter[str]): Calls of each operator; views and metadata are left out.

    Example:
        >>> with OperatorCounter() as operators:
        ...     loss.backward()
        >>> operators.counts.total()
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operator, and count it."""
        name = func._schema.name.partition('::')[2]
        if name not in _METADATA:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_step(cfg: Config, batch_size: int = 256) -> dict[str, Any]:
    """Count what one training step of a config does, without doing it.

    The step is the forward pass of all branches, the losses and the backward pass, on views of
    the size that ``train_dataloader.dataset.pipeline`` or the preprocessor makes. It runs on
    tensors that have shapes but no memory, so only the parameters are allocated. FLOPs are torch's
    count: two for each multiplication with addition in matrix products, convolutions and attention
    (whose kernels compute the scores again in the backward pass); norms, activations,
    interpolation, optimizer and moving average count nothing. Operators are those in float32 on
    a GPU, where a ViT takes b1 and b2 in one pass.

    With SER, ``equi_ratio * batch_size`` images are in b2. Where that is not a whole number, the
    counts of the two next to it are weighed. Both views of b2 are on the grid of the mean area
    and aspect, that of b1.

    Args:
        cfg (Config): Config of a run.
        batch_size (int): Images, b1 and b2 together. Defaults to 256.

    Returns:
        dict[str, Any]: ``algorithm``, the class without SER; ``flops`` and ``operators`` of a step;
        ``parameters`` and those ``trainable``; ``views``, their sizes in pixels; ``b2``, the images
        in it; and, with SER, ``parts``, the FLOPs of: the wrapped algorithm if all images were in
        b1; what changes when some are in b2; SERNeck and rho; the SER loss; and
        ``ratio_without_late_cls``, the step to the first of these parts, a baseline with [CLS] in
        the same blocks.

    Raises:
        ValueError: If the batch is empty, or the pipeline does not make views of an image.
    """
    if batch_size < 1:
        raise ValueError(f'count_step: batch_size={batch_size} must be positive.')
    model = build_model(cfg).train()
    views, ratio = _views(cfg, model)
    for module in model.modules():
        if hasattr(module, 'update_parameters'):
            module.update_parameters = lambda model: None  # it looks at how often it was called
        if hasattr(module, 'one_pass'):
            module.one_pass = True
    with_ser = hasattr(model, 'ser_head')
    b2 = ratio * batch_size if with_ser else 0.0
    low = math.floor(b2)
    weights = {low: low + 1 - b2, low + 1: b2 - low} if b2 > low else {low: 1.0}

    def count() -> dict[str, float]:
        total = Counter()
        for size, weight in weights.items():
            counted = _count(model, partial(_empty_views, views, batch_size, size, model))
            total.update({key: weight * value for key, value in counted.items()})
        return dict(total)

    whole = count()
    parts = {}
    if with_ser:
        # One thing after the other is left out, and what remains is counted again.
        model.ser_head.loss = lambda queries, *_: sum(x.sum() for x in queries)
        with_neck = count()['flops']
        model.loss = model.algorithm.loss
        network = count()['flops']
        weights = {0: 1.0}
        without_b2 = count()['flops']
        parts = dict(
            without_b2=without_b2,
            b2=network - without_b2,
            neck=with_neck - network,
            loss=whole['flops'] - with_neck,
        )
    counted = dict(
        algorithm=type(getattr(model, 'algorithm', model)).__name__,
        flops=round(whole['flops']),
        operators=round(whole['operators']),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        views=views,
        b2=b2,
        parts={key: round(value) for key, value in parts.items()},
    )
    if parts:
        counted['ratio_without_late_cls'] = counted['flops'] / counted['parts']['without_b2']
    return counted


def report_costs(config: dict, baseline: dict, config_name: str, baseline_name: str) -> str:
    """Tables of the cost of a step of a config beside that of its baseline.

    Args:
        config (dict): What :func:`count_step` counted and, optionally, :func:`take_turns` measured.
        baseline (dict): The same of the baseline.
        config_name (str): Title of its column.
        baseline_name (str): Title of its column.
    """
    views = ', '.join(f'{height} x {width}' for height, width in config['views'])
    formats = {
        'flops': ('GFLOPs', lambda x: f'{x / 1e9:,.1f}'),
        'operators': ('operators', '{:,}'.format),
        'parameters': ('parameters, all branches', '{:,}'.format),
        'trainable': ('trainable parameters', '{:,}'.format),
        'seconds': ('seconds', '{:.4f}'.format),
        'memory': ('MiB, peak', lambda x: f'{x / 2**20:,.0f}'),
    }
    rows = []
    for key, (title, form) in formats.items():
        if config.get(key) is not None:
            a, b = baseline[key], config[key]
            rows.append([title, form(a), form(b), f'{b / a:.4f}'])
    text = [
        f'Views of {views}; {config["b2"]:g} images in b2.',
        make_table(['', baseline_name, config_name, 'ratio'], rows),
    ]
    parts = config['parts']
    if parts:
        same = config['algorithm'] == baseline['algorithm']
        why = '[CLS] later' if same else f'{config["algorithm"]}, not {baseline["algorithm"]}'
        differences = {
            f'without b2, against the baseline ({why})': parts['without_b2'] - baseline['flops'],
            'images of b2 in the network, in place of as many of b1': parts['b2'],
            'SERNeck and rho': parts['neck'],
            'SER loss': parts['loss'],
            'in all': config['flops'] - baseline['flops'],
        }
        rows = [
            [title, f'{flops / 1e9:+,.2f}', f'{flops / baseline["flops"]:+.4%}']
            for title, flops in differences.items()
        ]
        text += [
            make_table(['where the difference is', 'GFLOPs', 'of the baseline'], rows),
            f'Against a baseline with the same [CLS]: {config["ratio_without_late_cls"]:.4f}.',
            'Counted: matrix products, convolutions and attention, forward and backward.\n'
            'Not counted: what works element by element, and grid_sample, by which rho moves maps.',
        ]
    return '\n\n'.join(text)


def _views(cfg: Config, model: nn.Module) -> tuple[list[tuple[int, int]], float]:
    """Height and width of each view of an image, and the share of images in b2."""
    preprocessor = model.data_preprocessor
    if getattr(preprocessor, 'views', None):
        ratio = preprocessor.equi_ratio or 0.0
        return [view.output_size(_PLAIN) for view in preprocessor.views], ratio
    pipeline = Compose(deepcopy(cfg.train_dataloader.dataset.pipeline))
    ratio = 0.0
    for transform in pipeline.transforms:
        if isinstance(transform, EquivariantViewPipeline):
            ratio, transform.equi_ratio = transform.equi_ratio, 0.0  # see the views of b1
    pipeline.transforms = [t for t in pipeline.transforms if not isinstance(t, LoadImageFromFile)]
    image = np.zeros((256, 256, 3), np.uint8)
    inputs = pipeline(dict(img=image, img_shape=image.shape[:2]))['inputs']
    if not isinstance(inputs, (list, tuple)):
        raise ValueError(
            'train_dataloader.dataset.pipeline makes one input of an image; the cost of a step is '
            'counted for algorithms that learn from several views of it.'
        )
    return [tuple(view.shape[-2:]) for view in inputs if view.ndim == 3], ratio


def _empty_views(
    views: Sequence[tuple[int, int]], batch_size: int, b2: int, model: nn.Module
) -> list[Tensor | ViewBatch]:
    """What the preprocessor hands to the algorithm."""
    inputs: list[Tensor | ViewBatch] = []
    for index, (height, width) in enumerate(views):
        base, equi = (torch.empty(n, 3, height, width) for n in (batch_size - b2, b2))
        if isinstance(model, TwoViewWrapper) and index < 2:
            draws = torch.empty(batch_size, NUM_DRAWS)
            inputs.append(ViewBatch(base, equi, torch.zeros(b2, dtype=torch.long), draws=draws))
        else:
            inputs.append(torch.empty(batch_size, 3, height, width))
    return inputs


def _count(model: nn.Module, inputs: Callable[[], list]) -> dict[str, int]:
    """FLOPs and operators of forward, loss and backward."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty_like(x).requires_grad_(x.requires_grad)
            for name, x in [*model.named_parameters(), *model.named_buffers()]
        }
        views = inputs()
        with _flop_counter() as flops, OperatorCounter() as operators:
            losses = functional_call(model, state, (views, None), dict(mode='loss'))
            model.parse_losses(losses)[0].backward()
    return dict(flops=flops.get_total_flops(), operators=operators.counts.total())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count what is kept for the backward pass, but for parameters and buffers.

    What is kept several times, and views of it, count once, with all of the memory that they hold.

    Args:
        model (nn.Module): The model whose parameters are left out.

    Yields:
        dict[int, int]: Bytes by the address of the memory; to read before the backward pass.

    Example:
        >>> with saved_bytes(model) as saved:
        ...     loss = model(images).sum()
        >>> total = sum(saved.values())
    """
    held = [*model.parameters(), *model.buffers()]
    own = {x.untyped_storage().data_ptr() for x in held}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


class TrainingStep:
    """Real training steps of a config on one batch of random images.

    A step is that of MMEngine: preprocessing, forward, backward, optimizer and moving average.

    Args:
        cfg (Config): Config of a run.
        batch_size (int): Images, b1 and b2 together.
        equi_ratio (float, optional): Share of the images in b2. Defaults to None: that of the
            config's pipeline.
        change (Callable[[nn.Module], None], optional): Called with the initialized model, to try
            what no config asks for. Defaults to None.

    Attributes:
        model (nn.Module): The model.
        optimizer (Optimizer): Its optimizer.
    """

    def __init__(
        self,
        cfg: Config,
        batch_size: int,
        equi_ratio: float | None = None,
        change: Callable[[nn.Module], None] | None = None,
    ) -> None:
        cfg = deepcopy(cfg)
        adapt_to_device(cfg)
        torch.manual_seed(0)
        self.model = build_model(cfg)
        self.model.init_weights()
        views, ratio = _views(cfg, self.model)
        if change is not None:
            change(self.model)
        self.model.to(get_device()).train()
        self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.optimizer = self.optim_wrapper.optimizer
        MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0, max_iters=10000))
        pinned = get_device() == 'cuda'
        inputs = [
            torch.randint(256, (batch_size, 3, *view), dtype=torch.uint8, pin_memory=pinned)
            for view in views
        ]
        if getattr(self.model.data_preprocessor, 'views', None):
            inputs = inputs[0]  # plain images, as large as their first view
            if isinstance(self.model, TwoViewWrapper) and equi_ratio is not None:
                self.model.data_preprocessor.equi_ratio = equi_ratio
        elif isinstance(self.model, TwoViewWrapper):
            if getattr(self.model, 'equi_head', None) is not None:
                inputs.append(torch.rand(batch_size, 2, NUM_DRAWS))
            record = torch.full((batch_size, 2), NOT_IN_B2)
            in_b2 = round((ratio if equi_ratio is None else equi_ratio) * batch_size)
            record[batch_size - in_b2 :] = torch.randint(NUM_ELEMENTS, (in_b2, 2))
            inputs.append(record)
        self.batch = dict(inputs=inputs, data_samples=None)

    def __call__(self) -> None:
        """Train for one step."""
        torch.manual_seed(0)  # the same grids of b2 in every step
        self.model.train_step(self.batch, self.optim_wrapper)

    def count(self) -> dict[str, int]:
        """``operators`` and ``flops`` of forward, loss and backward, counted as they run."""
        torch.manual_seed(0)
        averages = [m for m in self.model.modules() if hasattr(m, 'update_parameters')]
        for average in averages:
            average.update_parameters = lambda model: None
        data = self.model.data_preprocessor(self.batch, True)
        flops = _flop_counter()
        with OperatorCounter() as operators, flops, self.optim_wrapper.optim_context(self.model):
            loss, _ = self.model.parse_losses(self.model(**data, mode='loss'))
            loss.backward()
        self.model.zero_grad()
        for average in averages:
            del average.update_parameters
        return dict(operators=operators.counts.total(), flops=flops.get_total_flops())


def take_turns(steps: Mapping[str, Any], rounds: int, warmup: int = 2) -> dict[str, dict]:
    """Time training steps, one of each after the other, so that ratios are of neighbours.

    They hold when the speed of the machine drifts. Progress is written to stderr.

    Args:
        steps (Mapping[str, Callable[[], None]]): Run a step each; with ``model`` and
            ``optimizer``, as :class:`TrainingStep` has.
        rounds (int): Steps of each that count.
        warmup (int): Steps of each before those. Defaults to 2.

    Returns:
        dict[str, dict]: By name, the median ``seconds``; ``time_ratios`` to the first, by round,
        and ``time_ratio``, their median; on a GPU, ``memory``, the peak in bytes of weights,
        optimizer and step, and ``memory_ratio``.
    """
    cuda = get_device() == 'cuda'
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    times = {name: [] for name in steps}
    memory: dict[str, Any] = dict.fromkeys(steps)
    for i in range(warmup + rounds):
        for name, step in steps.items():
            synchronize()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step()
            synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
            if cuda:
                used = torch.cuda.max_memory_allocated() - before
                memory[name] = used + _held_bytes(step.model, step.optimizer)
        print(f'round {i + 1} of {warmup + rounds}', file=sys.stderr, flush=True)
    rows, first = {}, next(iter(steps))
    for name in steps:
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        rows[name] = dict(
            seconds=statistics.median(times[name]),
            time_ratio=statistics.median(ratios),
            time_ratios=ratios,
            memory=memory[name],
            memory_ratio=memory[name] / memory[first] if cuda else None,
        )
    return rows


def _held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, buffers and the state of the optimizer."""
    state = [x for values in optimizer.state.values() for x in values.values()]
    tensors = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, state)]
    return sum(x.nbytes for x in tensors)
