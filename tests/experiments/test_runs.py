"""Training runs as processes."""

from pathlib import Path

import pytest
from mmengine.config import Config

from ser_mm.experiments.runs import RunError, finished, train
from tests.support.paths import ROOT


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    cfg.work_dir = str(tmp_path / 'run')
    other = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    other.model.loss_weight = 0.5
    Path(f'{cfg.work_dir}.py').write_text(other.pretty_text)
    with pytest.raises(ValueError, match='holds a run with other settings'):
        train({'run': cfg})
    assert not Path(cfg.work_dir).exists()

    # Where it is kept and how it is evaluated is no other setting: a finished run counts.
    other = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    other.merge_from_dict(dict(work_dir='elsewhere', evaluation=dict(val=None)))
    Path(f'{cfg.work_dir}.py').write_text(other.pretty_text)
    Path(cfg.work_dir).mkdir()
    assert finished(cfg) is None
    Path(cfg.work_dir, 'last_checkpoint').write_text('elsewhere/epoch_8.pth')
    assert finished(cfg) == str(tmp_path / 'run' / 'epoch_8.pth')
    train({'run': cfg})


@pytest.mark.slow
def test_a_run_that_fails_is_told_with_the_end_of_its_log(tmp_path):
    runs = {}
    for name in ('good', 'bad'):
        cfg = Config.fromfile(ROOT / 'configs/demo/mocov3.py')
        cfg.work_dir = str(tmp_path / name)
        cfg.train_dataloader.dataset.update(
            data_root=str(tmp_path / 'photos'), train_per_picture=8, val_per_picture=1
        )
        cfg.custom_imports = dict(imports=['ser_mm'])
        runs[name] = cfg
    runs['bad'].model.backbone.type = 'NoSuchBackbone'
    with pytest.raises(RunError, match=r'(?s)bad failed with exit status 1; .*NoSuchBackbone'):
        train(runs)
    assert not finished(runs['good'])  # it was stopped
