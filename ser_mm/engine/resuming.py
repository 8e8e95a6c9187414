"""Going on from a checkpoint as the config says, also where that is no longer the saved run's."""

import logging
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmpretrain.models import CosineEMA
from mmpretrain.registry import HOOKS
from torch import nn

from ser_mm.datasets.exact_split import batch_size_of
from ser_mm.engine.schedules import spans_run

_BATCH = 'images_per_step'
# What the config says of an optimizer, beside what is scheduled.
_SETTINGS = ('lr', 'weight_decay', 'momentum', 'betas')


class ResumeError(ValueError):
    """A checkpoint from which the run of this config cannot go on."""


@HOOKS.register_module()
class ResumeHook(Hook):
    """Let a resumed run go on where a run of its config would be, in epochs and in schedules.

    MMEngine restores the number of iterations, the schedules and the optimizer's settings as they
    were saved. With another ``max_epochs``, batch size, data set or number of processes they are
    those of another run. Here the checkpoint is changed when it is read:

    - The epoch stays, and the iteration is that at which this run would start it.
    - Learning rate, weight decay and momentum are those of the config, its schedules followed step
      by step from the start, so with the same arithmetic as in a run that was not interrupted.
    - A ``CosineEMA`` counts the steps of this run.

    Where nothing changed, these are the saved values. In a loop by iteration the iteration stays,
    unless the number of images per step and ``max_iters`` changed such that the run sees as many
    images as before: then the images seen count.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Note what a later run needs to convert steps."""
        runner.message_hub.update_info(_BATCH, _images_per_step(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Change a checkpoint that a run resumes from, and check the weights of any.

        Of one that a run starts from by ``load_from``, the backbone has to fit; the averages of its
        momentum branch stay, and their schedule starts anew.

        Raises:
            ResumeError: If the weights do not fit, if the checkpoint is not of a run, was trained
                for longer than this run, or its position or schedules cannot be converted.
        """
        if runner._has_loaded:
            return
        if not runner._resume:
            weights = checkpoint.get('state_dict', checkpoint)
            _check_fit(runner, weights, 'backbone.')
            for key in _counts_of_averages(runner) & weights.keys():
                weights[key] = torch.ones_like(weights[key])  # 0 would copy the online branch
            return
        missing = {'state_dict', 'meta', 'message_hub'} - set(checkpoint)
        if missing:
            raise ResumeError(
                f'{runner._load_from} has no {", ".join(sorted(missing))}, which a run needs to go '
                'on; name a checkpoint of a run, or start from these weights by '
                '--cfg-options load_from=FILE, without --resume.'
            )
        _check_fit(runner, checkpoint['state_dict'])
        loop, meta = runner.train_loop, checkpoint['meta']
        saved = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        before = meta['iter']
        if isinstance(loop, IterBasedTrainLoop):
            meta['iter'] = _iteration(runner, before, saved)
            epochs, length = 0, meta['iter']
        elif isinstance(loop, EpochBasedTrainLoop):
            meta['epoch'] = _epoch(runner, meta, saved)
            epochs, length = meta['epoch'], len(loop.dataloader)
            meta['iter'] = epochs * length
        else:
            return  # whose positions only its author knows
        _follow_schedules(runner, checkpoint, saved, epochs, length, moved=meta['iter'] != before)
        if meta['iter'] != before:
            _move_averages(runner, checkpoint['state_dict'], before, meta['iter'])
            print_log(
                f'The checkpoint is at iteration {before}; this run, of {loop.max_iters} '
                f'iterations, goes on from iteration {meta["iter"]}.',
                logger='current',
            )


def _model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _check_fit(runner: Runner, weights: dict, start: str = '') -> None:
    """Refuse a checkpoint that would leave parameters at random: MMEngine logs it, and goes on."""
    if is_model_wrapper(runner.model) and not isinstance(
        runner.model, nn.parallel.DistributedDataParallel
    ):
        return  # each rank has a part of the weights
    shapes = {key.removeprefix('module.'): getattr(x, 'shape', None) for key, x in weights.items()}
    own = _model(runner).state_dict(keep_vars=True)
    needed = {
        key: x.shape
        for key, x in own.items()
        if key.startswith(start) and isinstance(x, nn.Parameter)
    }
    resized = (lambda key: key.endswith('pos_embed')) if start else (lambda key: False)
    odd = [k for k, x in needed.items() if shapes.get(k) != x and not (k in shapes and resized(k))]
    if not odd:
        return
    shape = shapes.get(odd[0])
    found = 'is missing' if shape is None else f'has shape {tuple(shape)}'
    more = f' there, as {len(odd) - 1} more do not fit' if len(odd) > 1 else ' there'
    remedy = 'take a checkpoint and a config of the same model'
    if start:
        remedy += (
            ", or start from the backbone alone by its init_cfg=dict(type='Pretrained', "
            'checkpoint=FILE), which knows other names, too'
        )
    raise ResumeError(
        f'{runner._load_from} is not of this model: {odd[0]}, {tuple(needed[odd[0]])}, {found}'
        f'{more}; {remedy}.'
    )


def _images_per_step(runner: Runner) -> int:
    return batch_size_of(runner.train_dataloader) * get_world_size()


def _epoch(runner: Runner, meta: dict, saved: dict) -> int:
    """The epoch that is trained next."""
    epoch, iteration = meta['epoch'], meta['iter']
    length = saved.get('max_iters', 0) // max(saved.get('max_epochs', 1), 1)
    if length and iteration == (epoch + 1) * length:
        epoch += 1  # a checkpoint by iteration, at the end of an epoch
    elif length and epoch * length < iteration < (epoch + 1) * length:
        print_log(
            f'The checkpoint was written after {iteration - epoch * length} of {length} iterations '
            f'of epoch {epoch + 1}, which is trained from its start.',
            logger='current',
            level=logging.WARNING,
        )
    _check_not_over(epoch, runner.max_epochs, 'epochs')
    return epoch


def _iteration(runner: Runner, iteration: int, saved: dict) -> int:
    """The iteration of this run at which it has done the same share of its work."""
    steps, images = runner.max_iters, _images_per_step(runner)
    steps_before, images_before = saved.get('max_iters', steps), saved.get(_BATCH, images)
    if images != images_before and steps != steps_before:
        # Of as many images, to within a step.
        if abs(steps * images - steps_before * images_before) >= max(images, images_before):
            raise ResumeError(
                f'The checkpoint is of a run of max_iters={steps_before} with {images_before} '
                f'images per step, and this one has max_iters={steps} with {images}: whether to go '
                f'on by steps or by images is not clear. Set train_cfg.max_iters={steps_before} '
                f'for the same steps, or {round(steps_before * images_before / images)} for the '
                'same images.'
            )
        iteration = iteration * steps // steps_before
    _check_not_over(iteration, steps, 'iters')
    return iteration


def _check_not_over(done: int, length: int, unit: str) -> None:
    if done > length:
        raise ResumeError(
            f'The checkpoint was trained for {done} {unit}, and train_cfg.max_{unit}={length}; '
            'raise it, or resume from an earlier checkpoint.'
        )
    if done == length:
        print_log(
            f'The checkpoint was trained for all of train_cfg.max_{unit}={length}; nothing is left '
            'to train.',
            logger='current',
            level=logging.WARNING,
        )


def _follow_schedules(
    runner: Runner, checkpoint: dict, saved: dict, epochs: int, length: int, moved: bool
) -> None:
    """Put the config's schedules and settings, at the position of the run, into a checkpoint."""
    wrapper, built = runner.optim_wrapper, runner.param_schedulers
    several = isinstance(wrapper, OptimWrapperDict)
    for name, one in wrapper.items() if several else [('', wrapper)]:
        schedulers = (built[name] if isinstance(built, dict) else built) or []
        _check_ends(runner, schedulers, saved)
        if any(getattr(s, 'need_val_args', False) for s in schedulers):
            if moved:
                raise ResumeError(
                    'param_scheduler: one that follows the results of validation, as '
                    'ReduceOnPlateauLR, cannot go on with another number of iterations '
                    f'({saved.get("max_iters")} in all before, {runner.max_iters} now); keep batch '
                    'size, data set and number of processes.'
                )
            continue
        _replay(schedulers, epochs, length)
        states = [scheduler.state_dict() for scheduler in schedulers]
        optimizer = checkpoint.get('optimizer') or {}
        if several:
            checkpoint.setdefault('param_schedulers', {})[name] = states
            optimizer = optimizer.get(name) or {}
        else:
            checkpoint['param_schedulers'] = states
        _take_settings(optimizer, one, {s.param_name for s in schedulers})


def _take_settings(state: dict, wrapper: OptimWrapper, scheduled: set[str]) -> None:
    """Change the settings in an optimizer's saved state to those that it has now."""
    groups = [*state.get('param_groups', ()), state.get('base_param_settings')]
    changes = {}
    for group, now in zip(groups, wrapper.param_groups, strict=False):
        fields = [f for f in (*_SETTINGS, *scheduled) if group and f in now]
        for field in fields:
            if _differ(group.get(field), now[field]):
                changes.setdefault(field, f'{field} {group.get(field)} -> {now[field]}')
            for key in (field, f'initial_{field}'):
                if key in now:
                    group[key] = now[key]
    if changes:
        print_log(
            f'Settings of the optimizer follow the config, not the checkpoint: '
            f'{", ".join(changes.values())}.',
            logger='current',
        )


def _differ(a: object, b: object) -> bool:
    as_list = [list(x) if isinstance(x, tuple) else x for x in (a, b)]
    return as_list[0] != as_list[1]


def _check_ends(runner: Runner, schedulers: Iterable[_ParamScheduler], saved: dict) -> None:
    for scheduler in schedulers:
        unit = 'epochs' if scheduler.by_epoch else 'iters'
        before, now = saved.get(f'max_{unit}'), getattr(runner, f'max_{unit}')
        if scheduler.end == before != now and spans_run(scheduler):
            raise ResumeError(
                f'param_scheduler: {type(scheduler).__name__} of {scheduler.param_name!r} ends '
                f'after {before} {unit}, as did the run of the checkpoint, and this run has '
                f'{now}. Set its end (and T_max) to what this run needs, or give begin and end in '
                'epochs, with convert_to_iter_based=True.'
            )


def _replay(schedulers: list[_ParamScheduler], epochs: int, length: int) -> None:
    """Step schedulers that have just been built as ParamSchedulerHook does.

    Args:
        schedulers (list[_ParamScheduler]): Of one optimizer, whose groups they change.
        epochs (int): Number of epochs; 0 in a loop by iteration.
        length (int): Iterations of each, or of the loop by iteration.
    """
    if not schedulers:
        return
    optimizer = schedulers[0].optimizer
    groups = optimizer.param_groups
    fields = {'betas'} | {s.param_name for s in schedulers}
    fields |= {f'initial_{field}' for field in fields}
    # Groups that start alike go alike, and an optimizer may have one for each parameter.
    keys = [tuple(repr(group.get(field)) for field in sorted(fields)) for group in groups]
    firsts = list(dict(zip(reversed(keys), reversed(range(len(groups))), strict=True)).values())
    place = {keys[first]: i for i, first in enumerate(firsts)}
    distinct = [groups[first] for first in firsts]
    stand_in = SimpleNamespace(param_groups=distinct, step=optimizer.step, _global_step=0)
    bases = [scheduler.base_values for scheduler in schedulers]
    for scheduler, base in zip(schedulers, bases, strict=True):
        scheduler.optimizer = stand_in
        scheduler.base_values = [base[first] for first in firsts]
    by_step = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    for _ in range(epochs or 1):
        for _ in range(length):
            for scheduler in by_step:
                scheduler.step()
        for scheduler in by_epoch if epochs else ():
            scheduler.step()
    for scheduler, base in zip(schedulers, bases, strict=True):
        scheduler.optimizer, scheduler.base_values = optimizer, base
        scheduler._last_value = [scheduler._last_value[place[key]] for key in keys]
    for key, group in zip(keys, groups, strict=True):
        first = distinct[place[key]]
        group.update({field: first[field] for field in fields if field in first})


def _move_averages(runner: Runner, state_dict: dict, before: int, now: int) -> None:
    """Let the averages whose momentum follows the run count its steps."""
    for key in _counts_of_averages(runner) & state_dict.keys() if before else ():
        state_dict[key] = state_dict[key] * now // before


def _counts_of_averages(runner: Runner) -> set[str]:
    """Names, in a checkpoint, of the numbers of steps that averages have made."""
    model = _model(runner)
    counts = {id(module.steps) for module in model.modules() if isinstance(module, CosineEMA)}
    # A model may name what it saves otherwise than its modules, as SERAlgorithm does.
    return {k for k, x in model.state_dict(keep_vars=True).items() if id(x) in counts}
