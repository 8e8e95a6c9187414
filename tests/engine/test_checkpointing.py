"""Checkpoints survive kills at any moment, and the newest that can be read is found."""

import copy
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.fileio import LocalBackend

from ser_mm.checkpoint import read_checkpoint
from ser_mm.engine.checkpointing import (
    AtomicCheckpointHook,
    check_same_on_all_ranks,
    find_resumable,
    resume_newest,
)
from ser_mm.engine.cpu import close_process_group
from tests.support import heads, short_run
from tests.support.algorithms import ALGORITHMS
from tests.support.two_ranks import on_two_ranks

EPOCHS = 4


def start(function, *args, ranks=1, store=None):
    """Processes that run a function of this module, as ranks of a group where there are several."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.engine.test_checkpointing'])
    processes = [
        context.Process(target=_quiet, args=(function, *args), kwargs=dict(group=group))
        for group in ([None] if ranks == 1 else [(str(store), r, ranks) for r in range(ranks)])
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes):
    """Their exit codes; negative if they were killed."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _quiet(function, *args, group=None):
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    try:
        if group:
            store, rank, ranks = group
            os.environ['LOCAL_RANK'] = str(rank)
            # A rank that is killed before it has connected is waited for.
            dist.init_process_group(
                'gloo',
                f'file://{store}',
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=120),
            )
        function(*args)
        close_process_group()
    except BaseException:
        if not group:  # the other rank was killed, and says no more than that
            traceback.print_exc()
        os._exit(1)


def train(root, folder, keep, resume=False, epochs=EPOCHS, method=None):
    cfg = Config(dict(work_dir=str(folder)))
    if resume:
        resume_newest(cfg)
    model, views = ALGORITHMS['simsiam'], short_run.equivariant_views(0.5)
    if method:  # beside SER
        model, views = heads.config(method, 'mocov3', 'original'), heads.views(method)
    short_run.run(
        model,
        views,
        root,
        folder,
        epochs=epochs,
        resume_from=cfg.get('load_from'),
        checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=keep),
    )


def train_and_die(root, folder, keep, moment, epochs, method=None):
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
    train(root, folder, keep, epochs=epochs, method=method)


def train_when_told(root, folder, keep, resume):
    """Everything is loaded when the folder exists."""
    if get_rank() == 0:
        Path(folder).mkdir(exist_ok=True)
    train(root, folder, keep, resume)


def weights(folder, epoch):
    return read_checkpoint(str(Path(folder, f'epoch_{epoch}.pth')))['state_dict']


@pytest.fixture(scope='module')
def uninterrupted(imagenet_tree, tmp_path_factory):
    """Weights after each of the last epochs on one and on two ranks, and seconds of a run."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp('whole')
        processes = start(train, imagenet_tree, folder / 'run', 3, ranks=ranks, store=folder / 's')
        assert ended(processes) == [0] * ranks
        first = min(file.stat().st_mtime for file in folder.rglob('*.py'))  # the dumped config
        last = (folder / 'run' / f'epoch_{EPOCHS}.pth').stat().st_mtime
        after = {epoch: weights(folder / 'run', epoch) for epoch in (2, 3, EPOCHS)}
        found[ranks] = after, last - first
    return found


def assert_complete(folder, keep):
    """What has a final name is whole, and there are as many as are to be kept."""
    complete = sorted(folder.glob('epoch_*.pth'))
    for file in complete:
        read_checkpoint(str(file))
    newest = max((int(file.stem.removeprefix('epoch_')) for file in complete), default=0)
    assert len(complete) >= min(keep, newest)


def assert_ended_as(expected, folder, epochs=EPOCHS):
    found = weights(folder, epochs)
    expected = expected[epochs]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not list(folder.glob('*.part'))


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('keep', [1, 2, 3])
def test_a_kill_at_any_write_rename_or_remove_loses_nothing(
    keep, ranks, imagenet_tree, uninterrupted, tmp_path
):
    epochs = keep + 1  # in the last, the first checkpoint is removed
    kills = 0
    for moment in range(0 if keep == 1 else 4 * keep, 40):  # 4 in an epoch, with a removal 5
        folder = tmp_path / f'moment{moment}'
        args = dict(ranks=ranks, store=tmp_path / f'store{moment}')
        codes = ended(start(train_and_die, imagenet_tree, folder, keep, moment, epochs, **args))
        if codes[0] == 0:
            break  # it ended before
        assert codes[0] == -signal.SIGKILL  # the other ends, too
        kills += 1
        assert_complete(folder, keep)
        args = dict(ranks=ranks, store=tmp_path / f'again{moment}')
        codes = ended(start(train, imagenet_tree, folder, keep, True, epochs, **args))
        assert codes == [0] * ranks
        assert_ended_as(uninterrupted[ranks][0], folder, epochs)
        shutil.rmtree(folder)
    assert kills == (9 if keep == 1 else 5)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(imagenet_tree, uninterrupted, tmp_path):
    """Runs that are killed, resumed and killed again until they end; 20 kills in all."""
    rng = random.Random(0)
    kills = runs = 0
    while kills < 20:
        ranks, keep = 1 + runs % 2, 1 + runs % 3
        expected, seconds = uninterrupted[ranks]
        folder = tmp_path / f'run{runs}'
        runs += 1
        for attempt in range(100):
            args = dict(ranks=ranks, store=tmp_path / f'store{runs}.{attempt}')
            processes = start(train_when_told, imagenet_tree, folder, keep, attempt > 0, **args)
            while attempt == 0 and not folder.exists():
                time.sleep(0.01)
            # Longer from time to time, so that a run ends on a machine that became slower.
            time.sleep(rng.uniform(0, seconds * (1 + attempt / 4)))
            # One rank, or both as where a machine is switched off.
            victims = rng.choice([processes, processes[:1], processes[-1:]])
            for process in victims:
                process.kill()
            codes = ended(processes)
            if codes == [0] * ranks:
                break
            kills += -signal.SIGKILL in codes
            assert_complete(folder, keep)
        assert codes == [0] * ranks
        assert_ended_as(expected, folder)


@pytest.mark.slow
@pytest.mark.parametrize('method', heads.HEADS)
def test_a_killed_run_of_another_method_loses_nothing(method, imagenet_tree, tmp_path):
    """Killed while it writes its second checkpoint."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    [code] = ended(start(train, imagenet_tree, whole, 2, False, 2, method))
    assert code == 0
    [code] = ended(start(train_and_die, imagenet_tree, killed, 2, 5, 2, method))
    assert code == -signal.SIGKILL and (killed / 'epoch_1.pth').exists()
    assert not (killed / 'epoch_2.pth').exists()
    [code] = ended(start(train, imagenet_tree, killed, 2, True, 2, method))
    assert code == 0
    assert_ended_as({2: weights(whole, 2)}, killed, 2)


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
