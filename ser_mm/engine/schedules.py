"""Parameter schedules that last as long as the run."""

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import _ParamScheduler

# What has one shape from begin to end. Steps and milestones are the author's, and stay.
_WHOLE = ('CosineAnnealing', 'Linear', 'Poly', 'OneCycle')


def follow_max_epochs(cfg: Config) -> None:
    """Let schedules end with the run, and say so in the log.

    A config is written for the epoch at which the last of its schedules ends. With another
    ``train_cfg.max_epochs``, schedules that end there end with the run; a warm-up keeps its length,
    or its share of the run where it would fill all of it. In a loop by iteration the same holds for
    ``max_iters`` and the schedules by iteration.

    Args:
        cfg (Config): Config of a run, changed in place. One whose schedules have no end is left as
            it is.

    Raises:
        ValueError: If a loop by iteration has a schedule by epoch, which would never move.
    """
    train_cfg = cfg.get('train_cfg') or {}
    by_epoch = bool(train_cfg.get('max_epochs'))
    unit = 'epochs' if by_epoch else 'iters'
    length = train_cfg.get(f'max_{unit}')
    given = cfg.get('param_scheduler') or []
    given = [given] if isinstance(given, dict) else list(given)
    known = [s for s in given if isinstance(s, dict) and 'type' in s]
    timed = [s for s in known if bool(s.get('by_epoch', True)) == by_epoch]
    if length and not by_epoch:
        _check_units([s for s in known if s not in timed], length)
    if not length or not timed or not all('end' in s for s in timed):
        return
    written = max(s['end'] for s in timed)
    schedules = [s for s in timed if _is_whole(s)]
    # Where milestones end last, or nothing but a warm-up is there, what ends before stays.
    if written == length or not any(s['end'] == written and spans_run(s) for s in schedules):
        return
    longest = max((s['end'] for s in schedules if s['end'] < written), default=0)
    shrink = length / written if longest >= length else 1
    for schedule in schedules:
        begin, end = schedule.get('begin', 0), schedule['end']
        spans = [key for key in ('T_max', 'total_steps') if schedule.get(key) == end - begin]
        schedule['begin'] = _shrunk(begin, shrink)
        schedule['end'] = length if end == written else _shrunk(end, shrink)
        for key in spans:
            schedule[key] = schedule['end'] - schedule['begin']
    # A warm-up that has shrunk to nothing.
    cfg.param_scheduler = [s for s in given if s not in schedules or s['end'] > s.get('begin', 0)]
    print_log(
        f'The schedules of the config end after {written} {unit}; they now end with '
        f'train_cfg.max_{unit}={length}.',
        logger='current',
    )


def _check_units(by_epoch: list[dict], max_iters: int) -> None:
    for schedule in by_epoch:
        if not schedule.get('convert_to_iter_based'):
            raise ValueError(
                f'param_scheduler: {_name(schedule)} counts epochs, and a loop by iteration '
                f'(train_cfg.max_iters={max_iters}) has one, so it would never move; set '
                'by_epoch=False and begin, end and T_max in iterations, or '
                'convert_to_iter_based=True.'
            )


def spans_run(schedule: _ParamScheduler | dict) -> bool:
    """Whether a schedule has one shape from begin to end, after which a value is to stay no longer.

    Args:
        schedule (_ParamScheduler | dict): Or its config.

    Returns:
        bool: Not so for steps, and for a warm-up.
    """
    return _is_whole(schedule) and not _rises(schedule)


def _name(schedule: _ParamScheduler | dict) -> str:
    kind = schedule['type'] if isinstance(schedule, dict) else type(schedule)
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _is_whole(schedule: _ParamScheduler | dict) -> bool:
    return _name(schedule).startswith(_WHOLE)


def _rises(schedule: _ParamScheduler | dict) -> bool:
    """Whether it is a warm-up, after which the value stays."""
    values = schedule if isinstance(schedule, dict) else vars(schedule)
    start, end = values.get('start_factor', 1 / 3), values.get('end_factor', 1)
    return _name(schedule).startswith('Linear') and start <= end


def _shrunk(epoch: int, share: float) -> int:
    return epoch if share == 1 else round(epoch * share)
