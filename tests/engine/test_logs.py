import json

from ser_mm.engine.logs import read_scalars
from ser_mm.progress import tell_progress


def test_of_two_starts_the_last_counts(tmp_path):
    for start, steps in dict(a=(1, 2, 3), b=(3, 4)).items():
        file = tmp_path / start / 'vis_data' / 'scalars.json'
        file.parent.mkdir(parents=True)
        lines = [json.dumps(dict(step=step, loss=float(start == 'b'))) for step in steps]
        # What is no record, and what a run that was killed has left.
        ends = [json.dumps(dict(accuracy=1)).encode(), b'3', b'\xff\xfe', b'{"step": 5, "lo']
        file.write_bytes(b'\n'.join([*map(str.encode, lines), *ends]))
    assert [(r['step'], r['loss']) for r in read_scalars(tmp_path)] == [
        (1, 0.0),
        (2, 0.0),
        (3, 1.0),
        (4, 1.0),
    ]


def test_progress_is_told_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr('time.monotonic', lambda: float(next(clock)))
    assert list(tell_progress('abcdef', 6, 'item')) == list('abcdef')
    assert capsys.readouterr().out.splitlines() == [
        '[  20 s] item 1/6, 100 s left',
        '[  40 s] item 3/6, 40 s left',
        '[  60 s] item 5/6, 12 s left',
    ]
