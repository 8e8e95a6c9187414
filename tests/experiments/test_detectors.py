"""Detectors that are trained and scored; with real ones in test_boxes.py and test_detection.py."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from ser_mm.experiments import detectors
from ser_mm.experiments.detectors import train_and_score
from ser_mm.experiments.runs import RunError


@pytest.fixture
def run(tmp_path):
    return Config(dict(work_dir=str(tmp_path / 'run'), train_cfg=dict(max_epochs=1)))


def test_a_score_whose_settings_were_removed_is_not_taken_for_those_of_an_interrupted_run(
    run, monkeypatch
):
    settings, score = (Path(f'{run.work_dir}.{suffix}') for suffix in ('py', 'json'))
    score.write_text(json.dumps(dict(bbox_mAP=0.5)))

    def interrupted(*_):
        settings.write_text(run.pretty_text)  # as training does before it starts
        raise KeyboardInterrupt

    monkeypatch.setattr(detectors, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_and_score({'run': run}, ['bbox_mAP'])
    monkeypatch.setattr(detectors, 'train', lambda *_: None)
    with pytest.raises(RunError):  # as it has not been trained
        train_and_score({'run': run}, ['bbox_mAP'])
    # A score of these settings is taken.
    score.write_text(json.dumps(dict(bbox_mAP=0.25)))
    assert train_and_score({'run': run}, ['bbox_mAP']) == {'run': dict(bbox_mAP=0.25)}


def test_a_run_without_its_last_checkpoint_is_not_scored(run, monkeypatch):
    monkeypatch.setattr(detectors, 'train', lambda *_: None)
    with pytest.raises(RunError, match=r'run has no epoch_1\.pth.*default_hooks\.checkpoint'):
        train_and_score({'run': run}, ['bbox_mAP'])
    assert not Path(f'{run.work_dir}.json').exists()
