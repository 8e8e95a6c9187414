"""The shipped recipe through the shipped tools: processes, kills, bad data, broken losses."""

import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS, MODELS

from ser_mm.cli._arguments import set_local_rank
from ser_mm.cli.train import main as train_main
from ser_mm.cli.train import merge_args, parse_args
from ser_mm.engine import EpochSeedHook
from ser_mm.engine.configs import find_config
from ser_mm.evaluation.data import build_preprocessor
from tests.support import short_run
from tests.support.command import run_command
from tests.support.paths import ROOT
from tests.support.ports import free_port

CONFIG = ROOT / 'configs' / 'ser_mocov3_vits16.py'
HANGS = 1800  # seconds, many times what a run takes on two cores


def short(data_root, *extra: str, epochs: int = 1) -> list[str]:
    """Arguments that shorten a shipped ViT recipe to a few steps of four images, two in b2."""
    return [
        '--cfg-options',
        f'train_cfg.max_epochs={epochs}',
        'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=1',
        f'train_dataloader.dataset.data_root={data_root}',
        'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
        'default_hooks.logger.interval=1',
        *extra,
    ]


def train(*args: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'ser_mm.cli.train', *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, check=check, text=True, stdout=-1, stderr=subprocess.STDOUT, **kwargs
    )


def dist_train(*args: str) -> subprocess.Popen:
    """``tools/dist_train.sh`` on two CPU processes, in a process group of its own."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = dict(os.environ, PORT=str(free_port()), PATH=path)
    env.setdefault('VIRTUAL_ENV', sys.prefix)
    command = ['bash', 'tools/dist_train.sh', CONFIG, '2', *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-2)


def kill(run: subprocess.Popen) -> None:
    """SIGKILL to a process and all below it: torchrun gives its ranks sessions of their own."""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    doomed = {run.pid}
    while below := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= below
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


def assert_same(a, b, place='') -> None:
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f'{place} differs by {(a - b).abs().max()}'
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f'{place}.{key}')
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f'{place}.{i}')
    else:
        assert a == b, place


@pytest.mark.slow
def test_killed_run_resumes_and_ends_as_the_uninterrupted_one(imagenet_tree, tmp_path):
    args = short(imagenet_tree, 'train_dataloader.batch_size=2', epochs=2)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    run = dist_train('--work-dir', whole, *args)
    out, _ = run.communicate(timeout=HANGS)
    assert run.returncode == 0, out

    run = dist_train('--work-dir', killed, *args)
    for line in run.stdout:  # 16 images, 2 ranks, 2 images each: 4 steps an epoch
        if 'Epoch(train) [2][2/4]' in line:
            break
    kill(run)
    assert (killed / 'epoch_1.pth').exists() and not (killed / 'epoch_2.pth').exists()

    run = dist_train('--work-dir', killed, '--resume', *args)
    out, _ = run.communicate(timeout=HANGS)
    assert run.returncode == 0, out
    assert 'Epoch(train) [1]' not in out and 'Epoch(train) [2][4/4]' in out
    a, b = (torch.load(d / 'epoch_2.pth', weights_only=False) for d in (whole, killed))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(a[part], b[part], part)
    first = torch.load(whole / 'epoch_1.pth', weights_only=False)['state_dict']
    moved = [k for k, v in a['state_dict'].items() if not torch.equal(v, first[k])]
    assert any(k.startswith('backbone.layers') for k in moved)
    assert any(k.startswith('ser_neck') for k in moved)
    assert any(k.startswith('momentum_encoder') for k in moved)


def test_epochs_and_workers_draw_different_views(imagenet_tree):
    """MMEngine's own worker seeds repeat in every epoch; ours depend on the epoch."""
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmpretrain')
    cfg.train_dataloader.update(batch_size=4, num_workers=2, sampler=dict(shuffle=False))
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    cfg.train_dataloader.dataset.data_root = str(imagenet_tree)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    state = type('Run', (), dict(seed=0, epoch=0, train_loop=None))()

    def epoch(number):
        state.epoch = number
        EpochSeedHook().before_train_epoch(state)
        return torch.cat([batch['inputs'][0] for batch in loader])

    first, second, again = epoch(0), epoch(1), epoch(0)
    assert torch.equal(first, again)
    assert not (first == second).flatten(1).all(1).any()


def test_workers_that_start_anew_draw_other_views_in_each_epoch(imagenet_tree):
    """By --no-persistent-workers, those of a config that says nothing of seeds drew the same."""
    dataset = dict(
        type='CustomDataset',
        data_root=str(imagenet_tree),
        with_label=False,
        pipeline=[
            dict(type='LoadReadableImage'),
            dict(type='RandomResizedCrop', scale=32),
            dict(type='PackInputs'),
        ],
    )
    sampler = dict(type='DefaultSampler', shuffle=False)
    loader = dict(batch_size=4, num_workers=2, sampler=sampler, dataset=dataset)
    content = dict(
        default_scope='mmpretrain',
        model=dict(type='MoCoV3'),
        train_dataloader=dict(loader, disable_subprocess_warning=True),
        train_cfg=dict(max_epochs=2),
    )
    cfg = Config(copy.deepcopy(content))
    merge_args(cfg, parse_args(['config.py', '--no-persistent-workers']))
    init_default_scope('mmpretrain')
    batches = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    epochs = []
    for epoch in range(2):
        state = type('Run', (), dict(seed=0, epoch=epoch, train_loop=None))()
        for hook in cfg.custom_hooks:
            if 'EpochSeedHook' in hook.type:
                HOOKS.build(hook).before_train_epoch(state)
        epochs.append(torch.cat([batch['inputs'] for batch in batches]))
    assert not (epochs[0] == epochs[1]).flatten(1).all(1).any()
    # What stays, reads nothing beside the run, or has its own seeds, is left as it is.
    for change in (dict(persistent_workers=True), dict(num_workers=0), dict(worker_init_fn={})):
        added = hooks_of(**{**content, 'train_dataloader': {**loader, **change}})
        assert 'EpochSeedHook' not in added, change
    # A loop by iteration starts them once, by MMEngine's seeds, which differ by rank.
    iterations = dict(by_epoch=False, max_iters=8)
    assert 'EpochSeedHook' not in hooks_of(**{**content, 'train_cfg': iterations})


@pytest.mark.slow
def test_corrupt_image_among_good_ones_is_skipped_and_named(imagenet_tree, tmp_path):
    folder = tmp_path / 'data' / 'train' / 'class'
    shutil.copytree(imagenet_tree / 'train' / 'n00000000', folder)
    for image in sorted(imagenet_tree.glob('train/n00000001/*'))[:3]:
        shutil.copy(image, folder)  # with the bad one, two batches
    bad = folder / 'bad.JPEG'
    bad.write_bytes(b'\xff\xd8 this is no image')
    run = train(CONFIG, '--work-dir', tmp_path / 'work', *short(tmp_path / 'data'))
    assert f'Skipped an unreadable image, {bad}' in run.stdout
    assert (tmp_path / 'work' / 'epoch_1.pth').exists()


@pytest.mark.slow
def test_only_corrupt_images_stop_with_an_error(tmp_path):
    folder = tmp_path / 'train' / 'class'
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f'{i}.JPEG').write_bytes(b'')
    run = train(CONFIG, '--work-dir', tmp_path / 'work', *short(tmp_path), check=False)
    assert run.returncode != 0
    assert 'Cannot find valid image' in run.stdout


@pytest.mark.parametrize('content', ['missing', 'empty'])
def test_missing_or_empty_data_folder_is_one_sentence(content, tmp_path):
    root = tmp_path / 'data'
    if content == 'empty':
        (root / 'train').mkdir(parents=True)
    sentence = run_command('train', CONFIG, '--work-dir', tmp_path / 'work', *short(root))
    assert sentence.startswith('error: train_dataloader.dataset.data_root')
    assert str(root) in sentence and '--cfg-options' in sentence and '\n' not in sentence
    assert not (tmp_path / 'work').exists()


@pytest.mark.slow
def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(imagenet_tree, tmp_path):
    """After a step of 1e30, products of weights overflow to both infinities, whose sum is nan."""
    hooks = [hook.type for hook in Config.fromfile(CONFIG).custom_hooks]
    place = hooks.index('NonFiniteLossHook')
    args = short(imagenet_tree, 'optim_wrapper.optimizer.lr=1e30', 'param_scheduler=[]', epochs=2)
    args += ['default_hooks.checkpoint.by_epoch=False']
    run = train(
        CONFIG, '--work-dir', tmp_path, *args, f'custom_hooks.{place}.interval=1', check=False
    )
    assert run.returncode != 0
    last = run.stdout.strip().splitlines()[-1]
    assert re.search(r'not finite at iteration \d+: loss=nan, loss_inv=\S+, loss_ser=\S+', last)
    iteration = int(re.search(r'iteration (\d+)', last)[1])
    kept = torch.load(tmp_path / f'iter_{iteration - 1}.pth', weights_only=False)
    assert not (tmp_path / f'iter_{iteration}.pth').exists()
    assert kept['meta']['iter'] == iteration - 1


def test_a_checkpoint_that_the_run_cannot_go_on_from_is_one_sentence(imagenet_tree, tmp_path):
    """It ended as if it had trained; schedules and images per step are checked likewise."""
    config = short_run.write_config(tmp_path / 'run.py', imagenet_tree, max_epochs=2)
    work = tmp_path / 'work'
    workers = 'train_dataloader.num_workers=0'
    train_main([str(config), '--work-dir', str(work), '--cfg-options', workers])
    shorter = 'train_cfg.max_epochs=1'
    sentence = run_command(
        'train', config, '--work-dir', work, '--resume', '--cfg-options', workers, shorter
    )
    assert sentence == (
        'error: The checkpoint was trained for 2 epochs, and train_cfg.max_epochs=1; raise it, or '
        'resume from an earlier checkpoint.'
    )
    # Begun anew in the same folder, it says what it writes over.
    told = f'{work} holds checkpoints of an earlier run, which this one writes over'
    first, *_ = sorted(work.glob('*/*.log'))
    assert told not in first.read_text()
    train_main([str(config), '--work-dir', str(work), '--cfg-options', workers, shorter])
    assert any(told in file.read_text() for file in work.glob('*/*.log'))


@pytest.mark.parametrize('place', ['model', 'algorithm'])
def test_views_of_the_device_differ_by_rank_and_epoch(place):
    """By a hook, which is added where the config has none."""
    views = dict(data_preprocessor=dict(type='SERDataPreprocessor', views=[[], []]))
    inner = dict(type='SimSiam', **(views if place == 'algorithm' else {}))
    model = dict(type='SERAlgorithm', algorithm=inner, **(views if place == 'model' else {}))
    for content, expected in ((model, True), (dict(type='SERAlgorithm', algorithm={}), False)):
        cfg = Config(dict(model=content, custom_hooks=[]))
        merge_args(cfg, parse_args(['config.py']))
        assert ('EpochSeedHook' in str(cfg.custom_hooks)) is expected


def hooks_of(**fields):
    cfg = Config({**dict(model=dict(type='MoCoV3'), custom_hooks=[]), **fields})
    merge_args(cfg, parse_args(['config.py']))
    return [hook.type.rpartition('.')[2] for hook in cfg.custom_hooks]


@pytest.mark.parametrize(
    'name', ['SERAlgorithm', 'EquivarianceAlgorithm', 'mmpretrain.SERAlgorithm']
)
def test_what_takes_views_has_their_hook(name):
    """It pairs the draws of STL, and refuses the views of another head."""
    for kind in (name, MODELS.get(name)):
        assert hooks_of(model=dict(type=kind, algorithm={})) == [
            'EquivariantSplitHook',
            'ResumeHook',
        ]
    assert hooks_of(model=dict(type='MoCoV3')) == ['ResumeHook']


@pytest.mark.parametrize('place', ['model.algorithm.data_preprocessor', 'model.data_preprocessor'])
@pytest.mark.parametrize('name', ['demo/ser_mocov3', 'demo/augself_mocov3'])
def test_training_and_evaluations_see_the_same_pixels(name, place):
    """MMEngine laid the config's mean and std over those of the algorithm, as options set them."""
    cfg = Config.fromfile(find_config(name))
    options = [f'{place}.mean=1,2,3', f'{place}.std=4,5,6']
    merge_args(cfg, parse_args([name, '--cfg-options', *options]))
    cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as the Runner does
    init_default_scope('mmpretrain')
    for preprocessor in (MODELS.build(cfg.model).data_preprocessor, build_preprocessor(cfg)):
        assert preprocessor.mean.flatten().tolist() == [1, 2, 3]
        assert preprocessor.std.flatten().tolist() == [4, 5, 6]
    assert preprocessor.to_rgb and MODELS.build(cfg.model).data_preprocessor._channel_conversion


def test_options_of_mixed_precision():
    """They are fields of the wrapper that --amp brings."""
    cfg = Config.fromfile(find_config('demo/ser_mocov3'))
    options = ['optim_wrapper.loss_scale=512', 'optim_wrapper.dtype=bfloat16']
    merge_args(cfg, parse_args(['config.py', '--amp', '--cfg-options', *options]))
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 512 and cfg.optim_wrapper.dtype == 'bfloat16'


def test_accumulated_gradients_have_the_hook_of_the_momentum_branch():
    assert hooks_of(optim_wrapper=dict(accumulative_counts=1)) == ['ResumeHook']
    added = hooks_of(optim_wrapper=dict(accumulative_counts=4))
    assert added == ['ResumeHook', 'MomentumUpdateHook']


def test_the_learning_rate_is_scaled_by_the_images_of_a_step():
    """Of all passes that make one; once, also from the config that a run has written."""
    for passes, expected in ((1, 1024), (4, 256)):
        cfg = Config(
            dict(
                model=dict(type='MoCoV3'),
                auto_scale_lr=dict(base_batch_size=1024),
                optim_wrapper=dict(accumulative_counts=passes),
            )
        )
        for _ in range(2):
            merge_args(cfg, parse_args(['config.py', '--auto-scale-lr']))
            assert cfg.auto_scale_lr.base_batch_size == expected and cfg.auto_scale_lr.enable


@pytest.mark.parametrize(
    ('launcher', 'variable', 'given'),
    [
        ('mpi', 'OMPI_COMM_WORLD_LOCAL_RANK', '0'),
        ('slurm', 'SLURM_LOCALID', '0'),
        ('pytorch', 'LOCAL_RANK', '0'),
        ('pytorch', None, '3'),
        ('none', None, '0'),
    ],
)
def test_the_local_rank_is_where_mmengine_reads_it(launcher, variable, given, monkeypatch):
    """MPI leaves it in a variable of its own; MMEngine would take GPU 0 on every rank."""
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    if variable:
        monkeypatch.setenv(variable, '3')
    set_local_rank(parse_args(['config.py', '--launcher', launcher, '--local_rank', given]))
    assert os.environ['LOCAL_RANK'] == ('0' if launcher == 'none' else '3')
