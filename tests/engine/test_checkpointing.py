"""Checkpoints survive kills at any moment, and the newest that can be read is found."""

import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import traceback
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend

from ser_mm.checkpoint import read_checkpoint
from ser_mm.engine.checkpointing import (
    AtomicCheckpointHook,
    check_same_on_all_ranks,
    find_resumable,
    resume_newest,
)
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS
from tests.support.two_ranks import on_two_ranks

EPOCHS = 4


def in_process(function, *args) -> int:
    """Exit code of a process that runs a function of this module; negative if it was killed."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.engine.test_checkpointing'])
    process = context.Process(target=_quiet, args=(function, *args))
    process.start()
    process.join()
    return process.exitcode


def _quiet(function, *args):
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def train(root, folder, keep, resume=False):
    cfg = Config(dict(work_dir=str(folder)))
    if resume:
        resume_newest(cfg)
    short_run.run(
        ALGORITHMS['simsiam'],
        short_run.equivariant_views(0.5),
        root,
        folder,
        epochs=EPOCHS,
        resume_from=cfg.get('load_from'),
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=keep),
    )


def train_and_die(root, folder, keep, moment):
    """Killed before, in the middle of or after the ``moment``-th write, rename or remove."""
    left = [moment]

    def strike():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    put, replace, unlink = LocalBackend.put, os.replace, os.unlink

    def put_and_die(self, content, path):
        strike()
        Path(path).write_bytes(bytes(content)[: len(content) // 2])
        strike()
        put(self, content, path)

    def replace_and_die(source, target):
        strike()
        replace(source, target)

    def unlink_and_die(path, **kwargs):
        strike()
        unlink(path, **kwargs)

    LocalBackend.put, os.replace, os.unlink = put_and_die, replace_and_die, unlink_and_die
    train(root, folder, keep)


def weights(folder):
    return read_checkpoint(str(Path(folder, f'epoch_{EPOCHS}.pth')))['state_dict']


@pytest.fixture(scope='module')
def uninterrupted(imagenet_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert in_process(train, imagenet_tree, folder, 3) == 0
    return weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize('keep', [1, 2, 3])
def test_a_kill_at_any_write_rename_or_remove_loses_nothing(
    keep, imagenet_tree, uninterrupted, tmp_path
):
    kills = 0
    # Keeping one is the hardest; with more, every third moment once there is one to remove.
    for moment in range(40) if keep == 1 else range(8, 40, 3):
        folder = tmp_path / f'moment{moment}'
        code = in_process(train_and_die, imagenet_tree, folder, keep, moment)
        if code == 0:
            break  # it ended before
        assert code == -signal.SIGKILL
        kills += 1
        complete = sorted(folder.glob('epoch_*.pth'))
        for file in complete:
            read_checkpoint(str(file))  # what has a final name is whole
        newest = max((int(file.stem.removeprefix('epoch_')) for file in complete), default=0)
        assert len(complete) >= min(keep, newest)
        assert in_process(train, imagenet_tree, folder, keep, True) == 0
        found = weights(folder)
        assert all(torch.equal(found[name], value) for name, value in uninterrupted.items())
        assert not list(folder.glob('*.part'))
        shutil.rmtree(folder)
    assert kills >= (15 if keep == 1 else 3)


@pytest.fixture
def run(imagenet_tree, tmp_path):
    folder = tmp_path / 'run'
    train(imagenet_tree, folder, 3)
    assert sorted(x.name for x in folder.glob('*.pth')) == [f'epoch_{n}.pth' for n in (2, 3, 4)]
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_4.pth')
    return folder


def newest(folder):
    found = find_resumable(Config(dict(work_dir=str(folder))))
    return found and Path(found)


def test_the_newest_readable_checkpoint_of_this_folder(run, tmp_path):
    """Whatever the file says that MMEngine goes by."""
    assert newest(run) == run / 'epoch_4.pth'
    data = (run / 'epoch_4.pth').read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (run / 'epoch_4.pth').write_bytes(data[:size])
        assert newest(run) == run / 'epoch_3.pth'
    (run / 'epoch_4.pth').write_bytes(data)
    for content in ('', '/nowhere/epoch_9.pth'):
        (run / 'last_checkpoint').write_text(content)
        assert newest(run) == run / 'epoch_4.pth'
    shutil.copytree(run, tmp_path / 'copied')
    assert newest(tmp_path / 'copied') == tmp_path / 'copied/epoch_4.pth'
    run.rename(tmp_path / 'moved')
    assert newest(tmp_path / 'moved') == tmp_path / 'moved/epoch_4.pth'


def test_what_cannot_be_resumed_from_is_passed_over(run):
    torch.save(dict(state_dict={}), run / 'epoch_5.pth')  # weights alone
    (run / 'best_epoch_7.pth').write_bytes(b'')
    assert newest(run) == run / 'epoch_4.pth'
    for file in run.glob('*.pth'):
        file.unlink()
    cfg = Config(dict(work_dir=str(run), resume=True, load_from='pretrained.pth'))
    resume_newest(cfg)
    assert cfg.resume is False and cfg.load_from == 'pretrained.pth'


def test_nothing_readable_is_an_error_and_not_a_new_start(run):
    """The run started from the beginning, and wrote over what might have been saved."""
    for file in run.glob('*.pth'):
        file.write_bytes(b'')
    with pytest.raises(ValueError, match='None of the 3 checkpoints .* Remove them'):
        newest(run)


def test_a_run_that_went_on_from_an_earlier_checkpoint(run):
    """The branch that was left has higher numbers, and is older."""
    for age, name in enumerate(['epoch_3.pth', 'epoch_4.pth']):
        os.utime(run / name, ns=(1, 10**18 - age * 10**9))
    (run / 'last_checkpoint').write_text('/moved/since/run/epoch_3.pth')
    assert newest(run) == run / 'epoch_3.pth'
    os.utime(run / 'epoch_4.pth')  # written later, by a run killed before it wrote the pointer
    assert newest(run) == run / 'epoch_4.pth'


def test_names_and_folders_as_the_hook_says(run, tmp_path):
    (run / 'epoch_4.pth').rename(run / 'step4.ckpt')
    hook = dict(type='CheckpointHook', filename_tmpl='step{}.ckpt')
    cfg = Config(dict(work_dir=str(run), default_hooks=dict(checkpoint=hook)))
    assert find_resumable(cfg) == str(run / 'step4.ckpt')
    hook = dict(type='CheckpointHook', out_dir=str(run.parent))
    elsewhere = str(tmp_path / 'elsewhere' / 'run')
    cfg = Config(dict(work_dir=elsewhere, default_hooks=dict(checkpoint=hook)))
    assert find_resumable(cfg) == str(run / 'epoch_3.pth')
    cfg = Config(dict(work_dir=str(run), default_hooks=dict(checkpoint=dict(out_dir=str(run)))))
    assert find_resumable(cfg) == str(run / 'epoch_3.pth')


def both_ranks(rank, names):
    cfg = Config(dict(work_dir='run', resume=names[rank] is not None, load_from=names[rank]))
    try:
        check_same_on_all_ranks(cfg)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_are_refused():
    assert on_two_ranks(both_ranks, ['/a/epoch_3.pth', '/b/epoch_3.pth']) == [None, None]
    for message in on_two_ranks(both_ranks, ['/a/epoch_3.pth', None]):
        assert 'different checkpoints (epoch_3.pth, none)' in message and 'work_dir=run' in message


def test_the_best_checkpoint_of_a_copied_folder_is_its_own(imagenet_tree, tmp_path):
    """The next better one removed that of the original."""
    runner, _ = short_run.run(
        ALGORITHMS['simsiam'],
        short_run.equivariant_views(0.5),
        imagenet_tree,
        tmp_path / 'run',
        epochs=1,
    )
    for save_best in ('acc', ['acc', 'loss']):
        hook = AtomicCheckpointHook(save_best=save_best, rule='greater')
        for name in ('best_ckpt', 'best_ckpt_acc'):
            runner.message_hub.update_info(name, '/original/run/best_acc_epoch_3.pth')
        hook.before_train(runner)
        expected = str(tmp_path / 'run' / 'best_acc_epoch_3.pth')
        assert expected in (
            getattr(hook, 'best_ckpt_path', None),
            getattr(hook, 'best_ckpt_path_dict', {}).get('acc'),
        )


@pytest.mark.parametrize('save_best', ['acc', ['acc', 'loss']])
def test_the_best_checkpoint_so_far_is_there_until_the_better_one_is(
    save_best, imagenet_tree, tmp_path, monkeypatch
):
    runner, _ = short_run.run(
        ALGORITHMS['simsiam'],
        short_run.equivariant_views(0.5),
        imagenet_tree,
        tmp_path / 'run',
        epochs=1,
    )
    hook = AtomicCheckpointHook(save_best=save_best, rule='greater')
    hook.before_train(runner)

    def bests():
        return sorted(file.name for file in (tmp_path / 'run').glob('best_acc*.pth*'))

    def epoch(number, acc):
        runner.train_loop._epoch = number
        hook.after_val_epoch(runner, dict(acc=acc, loss=0.0))

    epoch(1, 0.1)
    assert bests() == ['best_acc_epoch_1.pth']
    kept, save = copy.deepcopy(runner.message_hub.runtime_info), torch.save

    def full_disk(content, file, *args, **kwargs):
        save(content, file, *args, **kwargs)
        raise OSError('No space left on device')

    with monkeypatch.context() as disk:
        disk.setattr(torch, 'save', full_disk)
        with pytest.raises(OSError, match='No space'):
            epoch(2, 0.2)
    assert bests()[0] == 'best_acc_epoch_1.pth' and 'best_acc_epoch_2.pth' not in bests()
    runner.message_hub.runtime_info.update(kept)  # as a run that is resumed has it
    hook.before_train(runner)
    epoch(3, 0.3)
    assert bests() == ['best_acc_epoch_3.pth']
    epoch(3, 0.4)  # of the same name
    assert bests() == ['best_acc_epoch_3.pth']
    read_checkpoint(str(tmp_path / 'run' / 'best_acc_epoch_3.pth'))


def test_epoch_10_is_after_epoch_9(run):
    shutil.copy(run / 'epoch_4.pth', run / 'epoch_10.pth')
    shutil.copy(run / 'epoch_3.pth', run / 'epoch_9.pth')
    assert newest(run).name == 'epoch_10.pth'


def test_code_in_the_newest_is_refused_and_not_passed_over(run):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(run / 'harm'),)

    torch.save(dict(state_dict=Harm()), run / 'epoch_9.pth')
    with pytest.raises(pickle.UnpicklingError, match='epoch_9.pth holds more than data'):
        newest(run)
    assert not (run / 'harm').exists()
