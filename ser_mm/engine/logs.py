"""Reading what MMEngine logged of a run."""

import json
from pathlib import Path


def read_scalars(work_dir: str | Path) -> list[dict]:
    """What MMEngine logged of a run, in order of the iterations.

    A run that was resumed has one log per start; where they overlap, the last one counts.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per logged iteration: ``step``, ``loss``, ``lr``, ``time``, ...
    """
    records = {}
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed, or is just now writing the line
                continue
            if 'loss' in record:
                records[record['step']] = record
    return [records[step] for step in sorted(records)]
