"""Reading what MMEngine logged of a run."""

import json
from contextlib import suppress
from pathlib import Path


def read_scalars(work_dir: str | Path) -> list[dict]:
    """What MMEngine logged of a run, in order of the iterations.

    A run that was resumed has one log per start; where they overlap, the last one counts.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per logged iteration: ``step``, ``loss``, ``lr``, ``time``, ...
    """
    records = {r['step']: r for r in read_records(work_dir) if 'loss' in r and 'step' in r}
    return [records[step] for step in sorted(records)]


def read_records(work_dir: str | Path) -> list[dict]:
    """All that MMEngine logged of a run, as it was written.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per line that is whole.
    """
    records = []
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in file.read_text(errors='replace').splitlines():
            with suppress(json.JSONDecodeError):  # the run was killed, or just now writes the line
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
