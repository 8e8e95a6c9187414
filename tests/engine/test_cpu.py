import os

from ser_mm.engine.cpu import count_cores


def test_cores_of_systems_that_do_not_tell_which_a_process_may_use(monkeypatch):
    assert count_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert count_cores() == os.cpu_count()
