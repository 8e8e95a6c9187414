"""Parameter schedules that last as long as the run."""

from mmengine.config import Config
from mmengine.logging import print_log

# What has one shape from begin to end. Steps and milestones are the author's, and stay.
_WHOLE = ('CosineAnnealing', 'Linear', 'Poly')


def follow_max_epochs(cfg: Config) -> None:
    """Let schedules by epoch end with ``train_cfg.max_epochs``, and say so in the log.

    A config is written for the epoch at which the last of its schedules ends. With another
    ``max_epochs``, schedules that end there end with the run; a warm-up keeps its length, or its
    share of the run where it would fill all of it.

    Args:
        cfg (Config): Config of a run, changed in place. One that is trained by iterations, or
            whose schedules have no end, is left as it is.
    """
    epochs = (cfg.get('train_cfg') or {}).get('max_epochs')
    given = cfg.get('param_scheduler') or []
    given = [given] if isinstance(given, dict) else list(given)
    timed = [s for s in given if isinstance(s, dict) and s.get('by_epoch', True)]
    if not epochs or not timed or not all('end' in s for s in timed):
        return
    written = max(s['end'] for s in timed)
    schedules = [s for s in timed if _is_whole(s)]
    # Where milestones end last, what ends before them is a warm-up.
    if written == epochs or all(s['end'] < written for s in schedules):
        return
    longest = max((s['end'] for s in schedules if s['end'] < written), default=0)
    shrink = epochs / written if longest >= epochs else 1
    for schedule in schedules:
        begin, end = schedule.get('begin', 0), schedule['end']
        spans = schedule.get('T_max') == end - begin
        schedule['begin'] = _shrunk(begin, shrink)
        schedule['end'] = epochs if end == written else _shrunk(end, shrink)
        if spans:
            schedule['T_max'] = schedule['end'] - schedule['begin']
    # A warm-up that has shrunk to nothing.
    cfg.param_scheduler = [s for s in given if s not in schedules or s['end'] > s.get('begin', 0)]
    print_log(
        f'The schedules of the config end after {written} epochs; they now end with '
        f'train_cfg.max_epochs={epochs}.',
        logger='current',
    )


def _is_whole(schedule: dict) -> bool:
    kind = schedule.get('type', '')
    kind = kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__
    return kind.startswith(_WHOLE)


def _shrunk(epoch: int, share: float) -> int:
    return epoch if share == 1 else round(epoch * share)
