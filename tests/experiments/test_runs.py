"""Training runs as processes."""

import copy
import fcntl
import socket
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from ser_mm.experiments.runs import RunError, check_settings, finished, set_processes, train
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
    assert finished(cfg) is None  # it was copied without its checkpoint
    torch.save({}, tmp_path / 'run' / 'epoch_8.pth')
    assert finished(cfg) == str(tmp_path / 'run' / 'epoch_8.pth')
    train({'run': cfg})
    assert [file.name for file in tmp_path.iterdir() if file.suffix != '.py'] == ['run']


def test_a_run_whose_last_checkpoint_is_cut_off_is_not_finished(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(max_epochs=8)))
    pointer, final = tmp_path / 'last_checkpoint', tmp_path / 'epoch_8.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(9))), final)
    pointer.write_text(str(final))
    assert finished(cfg) == str(final)
    content = final.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 30):
        final.write_bytes(content[:length])
        assert finished(cfg) is None
    final.write_bytes(content)
    for text in (b'', b'\xff\xfe', b'epoch_7.pth'):
        pointer.write_bytes(text)
        assert finished(cfg) is None


def test_settings_that_cannot_be_read_are_named_with_what_to_do(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    cfg.work_dir = str(tmp_path / 'run')
    kept = tmp_path / 'run.py'
    kept.write_text(cfg.pretty_text[:-20])
    with pytest.raises(ValueError, match=rf'{kept}, the settings of .* remove this file if they'):
        check_settings(cfg)
    kept.unlink()
    check_settings(cfg)


def test_runs_of_other_processes_are_told_apart(tmp_path):
    """batch_size is that of one, so that their steps are of other batches."""
    cfg = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    cfg.work_dir, kept = str(tmp_path / 'run'), tmp_path / 'run.py'
    kept.write_text(cfg.pretty_text)
    for processes in (None, 1):
        set_processes([cfg], processes)
        check_settings(cfg)
    two = copy.deepcopy(cfg)
    set_processes([two], 2)
    with pytest.raises(ValueError, match='run holds a run with other settings'):
        check_settings(two)


def test_a_run_that_another_process_has_is_refused(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    cfg.work_dir = str(tmp_path / 'run')
    other = Path(f'{cfg.work_dir}.lock')
    with other.open('w') as file:
        file.write(f'1 {socket.gethostname()}')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match=rf'{cfg.work_dir} is in use by process 1 on'):
            train({'run': cfg})
    assert list(tmp_path.iterdir()) == [other]


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


@pytest.mark.slow
def test_a_run_that_keeps_no_final_checkpoint_is_told(tmp_path):
    """What measures it would take random weights for it."""
    cfg = Config.fromfile(ROOT / 'configs/demo/mocov3.py')
    cfg.work_dir = str(tmp_path / 'run')
    cfg.train_dataloader.batch_size = 4
    cfg.train_dataloader.dataset.update(
        data_root=str(tmp_path / 'photos'), train_per_picture=8, val_per_picture=1, indices=8
    )
    cfg.train_cfg.max_epochs = 2
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3)
    cfg.custom_imports = dict(imports=['ser_mm'])
    with pytest.raises(RunError, match=r'run has no epoch_2.pth, though its run has ended; let'):
        train({'run': cfg})
    assert (tmp_path / 'run' / 'iter_3.pth').is_file()
