"""Detectors on own annotations: shares, tables, refusals, and a protocol that is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

from ser_mm.cli.train import main as train_command
from ser_mm.experiments import detection
from ser_mm.experiments.detection import (
    compare_detectors,
    draw_shares,
    report_detectors,
)
from tests.support.own_boxes import QUICK, write_backbone, write_own_boxes
from tests.support.paths import ROOT


@pytest.fixture
def data(tmp_path):
    """Annotations, photos, and weights with [CLS] from the input and after block 2."""
    init_default_scope('mmpretrain')
    write_own_boxes(tmp_path / 'data')
    write_backbone(tmp_path / 'early.pth', 0)
    write_backbone(tmp_path / 'late.pth', 1, cls_layer=2)
    return tmp_path / 'data'


def arguments(data, **others):
    """Those of a comparison that is quick."""
    files = dict(train=data / 'train.json', val=data / 'val.json', images=data / 'photos')
    names = {name: str(data.parent / f'{name}.pth') for name in ('early', 'late')}
    runs = dict(backbones=names, work_dir=data.parent / 'work', seeds=[0, 1], cfg_options=QUICK)
    return dict(config='faster-rcnn_tiny', **files) | runs | others


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_shares_are_nested_and_drawn_by_the_seed():
    ids = [f'image {i}' for i in range(40)]
    few, some, all_ = draw_shares(ids, [2, 20, 40], 3)
    assert set(few) < set(some) < set(all_) == set(ids)
    assert [len(set(x)) for x in (few, some, all_)] == [2, 20, 40]
    assert draw_shares(ids, [20], 3) == [some] != draw_shares(ids, [20], 4)
    counts = np.zeros(40)
    for seed in range(400):
        for image in draw_shares(ids, [10], seed)[0]:
            counts[ids.index(image)] += 1
    # Each is drawn 100 times of 400 with deviation sqrt(400 * 3 / 16), here by up to 5 of them.
    assert abs(counts - 100).max() < 5 * 75**0.5


def planned(monkeypatch, **call):
    """The runs of a comparison, none of which is trained, by backbone, mode, share and seed."""
    runs = {}

    def score(configs, metrics, jobs, gpus):
        runs.update({tuple(name.split(', ')): cfg for name, cfg in configs.items()})
        return {name: dict.fromkeys(metrics, 0.5) for name in configs}

    monkeypatch.setattr(detection, 'train_and_score', score)
    compare_detectors(**call)
    return runs


def test_all_runs_take_as_many_steps_of_their_share(data, monkeypatch):
    shares = [0.25, 0.75, 1]
    runs = planned(monkeypatch, **arguments(data, shares=shares, scratch=True))
    assert len(runs) == 2 * 3 * 3 * 2
    init_default_scope('mmdet')
    seen = {}
    for (name, mode, share, seed), cfg in runs.items():
        assert cfg.randomness.seed == int(seed)
        assert cfg.model.backbone.cls_layer == (0 if name == 'early' else 2)
        assert cfg.model.backbone.frozen_stages == (4 if mode == 'frozen' else -1)
        if mode == 'frozen' and seed == '0':
            loader = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=int(seed))
            batches = [[x.img_id for x in batch['data_samples']] for batch in loader]
            assert [len(batch) for batch in batches] == [2, 2] and len(loader) == 2
            seen.setdefault(share, []).append(batches)
    # The same images in the same order, whatever the backbone.
    assert all(x == some[0] for some in seen.values() for x in some)
    few, more, all_ = ({id for batch in seen[str(float(x))][0] for id in batch} for x in shares)
    assert few < more < all_ and [len(x) for x in (few, more, all_)] == [1, 3, 4]
    truth = json.loads((data / 'train.json').read_text())
    part = json.loads((data.parent / 'work' / 'shares' / 'share0.75_seed0.json').read_text())
    assert {x['id'] for x in part['images']} == more
    assert part['annotations'] == [x for x in truth['annotations'] if x['image_id'] in more]
    assert part['categories'] == truth['categories']
    random = {
        cfg.model.backbone.init_cfg.checkpoint for key, cfg in runs.items() if 'random' in key
    }
    assert len(random) == 2 and all(Path(file).is_file() for file in random)


def test_what_repeats_images_makes_more_steps_for_all_shares(data, monkeypatch):
    config = data.parent / 'balanced.py'
    config.write_text(
        f'_base_ = [{str(ROOT / "configs" / "tiny_imagenet" / "faster-rcnn_tiny.py")!r}]\n'
        'train_dataloader = dict(dataset=dict(\n'
        "    _delete_=True, type='ClassBalancedDataset', oversample_thr=4.0,\n"
        '    dataset=_base_.train_dataloader.dataset))\n'
        "test_evaluator = dict(_delete_=True, type='CocoMetric')\n"  # metric is 'bbox' by default
    )
    call = arguments(data, config=config, modes=['frozen'], seeds=[0], shares=[0.5, 1])
    runs = planned(monkeypatch, **call)
    init_default_scope('mmdet')
    for cfg in runs.values():
        # Each class is in all of the 4 images, which come sqrt(4) times in batches of 2.
        assert len(Runner.build_dataloader(deepcopy(cfg.train_dataloader))) == 4
    results = json.loads((call['work_dir'] / 'detection.json').read_text())
    assert results['about']['steps'] == 4 and 'bbox_mAP' in results['runs'][0]


def test_a_network_of_timm_is_trained_with_the_detector(data, monkeypatch):
    backbone = dict(type='SERTimmViT', model='vit_tiny_patch16_224', out_type='featmap')
    network = MODELS.build(backbone)
    torch.save(network.state_dict(), data.parent / 'timm.pth')
    own = dict(backbone, type='mmpretrain.SERTimmViT', _delete_=True)
    options = QUICK | {'model.neck.in_channels': 192, 'model.backbone': own}
    options = {key: x for key, x in options.items() if not key.startswith('model.backbone.')}
    names = dict(timm=str(data.parent / 'timm.pth'))
    call = arguments(data, backbones=names, modes=['unfrozen'], seeds=[0], cfg_options=options)
    (cfg,) = planned(monkeypatch, **call).values()
    init_default_scope('mmdet')
    detector = DETECTORS.build(cfg.model)
    assert all(x.requires_grad for x in detector.backbone.parameters())


def test_runs_of_as_many_processes_are_the_same_runs(data, monkeypatch):
    backbones = dict(early=str(data.parent / 'early.pth'))
    call = arguments(data, backbones=backbones, seeds=[0], modes=['frozen'])
    one, same, other = (
        [cfg.inputs for cfg in planned(monkeypatch, **call, gpus=gpus).values()]
        for gpus in (None, 1, 2)
    )
    assert len(one) == 1 and one == same != other


def test_a_seed_in_the_path_is_a_pretraining_of_its_own(data, monkeypatch):
    for seed in (0, 1):
        (data.parent / f'early{seed}.pth').write_bytes((data.parent / 'early.pth').read_bytes())
    backbones = dict(own=str(data.parent / 'early{seed}.pth'))
    call = arguments(data, backbones=backbones, modes=['unfrozen'], scratch=True)
    runs = planned(monkeypatch, **call)
    names = {key[3]: Path(x.model.backbone.init_cfg.checkpoint).name for key, x in runs.items()
             if key[0] == 'own'}  # fmt: skip
    assert names == {'0': 'early0.pth', '1': 'early1.pth'}
    assert {key[:2] for key in runs} == {('own', 'unfrozen'), ('random', 'unfrozen')}
    assert 'One checkpoint for all seeds' not in (call['work_dir'] / 'detection.md').read_text()


def other_order(content):
    content['categories'].reverse()


def of_the_other(content):
    content['images'][0]['file_name'] = 'train_0.png'


def gone(content):
    content['images'][1]['file_name'] = 'none.png'


@pytest.mark.parametrize(
    ('change', 'others', 'message'),
    [
        (other_order, {}, r"categories \['red', 'green', 'blue'\], and val: .*same order"),
        (of_the_other, {}, r'val: 1 of the images of .* in .*train\.json too, such as .*train_0'),
        (gone, {}, r'none\.png does not exist \(1 of the 2 images.*data_prefix\.img=PATH'),
        (None, dict(train=Path('none.json')), 'train: none.json does not exist'),
        (None, dict(shares=[0.2, 1]), r'0\.2 of the 4 images.*the smallest share is 0\.25'),
        (None, dict(shares=[10]), r'shares: 10\.0 is not above 0 and up to 1'),
        (None, dict(backbones=dict(random='early.pth')), "backbones: 'random' names a folder"),
        (None, dict(backbones={'a/b': 'early.pth'}), "backbones: 'a/b' names a folder"),
        (None, dict(backbones=dict(a='none.pth')), 'a=none.pth is not a file'),
        (None, dict(config='ser_mocov3_vits16', cfg_options={}), 'is not the config of a detector'),
        (None, dict(modes=['half']), "modes: 'half' is not one of frozen and unfrozen"),
        (None, dict(cfg_options=QUICK | {'model.backbone.frozen_stages': 3}), 'weights to train'),
        (None, dict(cfg_options=QUICK | {'val_dataloader.num_workers': 3}), 'set test_dataloader'),
        (None, dict(cfg_options=QUICK | {'load_from': 'whole.pth'}), 'set load_from=None'),
        (
            None,
            dict(cfg_options=QUICK | {'model.init_cfg': dict(type='Pretrained', checkpoint='x')}),
            r'set model\.init_cfg=None',
        ),
        (
            None,
            dict(cfg_options=QUICK | {'default_hooks.checkpoint.by_epoch': False}),
            'leaves out the checkpoint of the last epoch',
        ),
        (
            None,
            dict(
                cfg_options=QUICK | {'default_hooks.checkpoint': dict(interval=2, save_last=False)}
            ),
            'leaves out the checkpoint of the last epoch',
        ),
        (None, dict(cfg_options=QUICK | {'test_evaluator.metric': 'segm'}), 'not give the mAP of'),
        (None, dict(cfg_options=QUICK | {'test_evaluator.prefix': 'own'}), 'not give the mAP of'),
        (None, dict(cfg_options=QUICK | {'model.roi_head.odd': 1}), r'cannot be built: .*\bodd\b'),
        (
            None,
            dict(cfg_options=QUICK | {'model.backbone.arch.feedforward_channels': 50}),
            r'backbones: early: .*early\.pth.* does not fit SERVisionTransformer',
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(data, change, others, message):
    if change:
        edit(data / 'val.json', change)
    with pytest.raises((ValueError, OSError), match=message):
        compare_detectors(**arguments(data, **others))
    assert not (data.parent / 'work').exists()


def test_cfg_options_are_the_way_out_that_a_sentence_names(data, monkeypatch):
    """Of a folder of images that is wrong, for one."""
    wrong = arguments(data, images=data, modes=['frozen'])
    with pytest.raises(FileNotFoundError, match=r'test_dataloader|train_dataloader'):
        compare_detectors(**wrong)
    place = 'dataloader.dataset.data_prefix.img'
    right = {f'{split}_{place}': f'{data}/photos' for split in ('train', 'test')}
    assert planned(monkeypatch, **wrong | dict(cfg_options=QUICK | right))


def cells(table):
    lines = [line.strip('|').split('|') for line in table.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def assert_table_follows(results, table):
    """Recompute means, intervals and differences by their formulas."""
    header, *rows = cells(table)
    first = next(iter(results['about']['backbones']))
    values = {}
    for run in results['runs']:
        key = run['backbone'], run['mode'], f'{100 * run["share"]:g} %'
        values.setdefault(key, {})[run['seed']] = run
    assert len(rows) == len(values)

    def interval(x):
        half = scipy.stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / len(x) ** 0.5
        return np.mean(x) - half, np.mean(x) + half

    for row in rows:
        by_title = dict(zip(header[:-3], row, strict=False))
        mode = 'unfrozen' if row[1] == 'from scratch' else row[1]
        runs = values[row[0], mode, row[2]]
        assert (row[1] == 'from scratch') == (row[0] == 'random' and mode == 'unfrozen')
        maps = np.array([run['bbox_mAP'] for run in runs.values()])
        assert by_title['box mAP'] == f'{maps.mean():.3f}'
        assert row[4] == str(len(runs)) and row[3] == str(next(iter(runs.values()))['images'])
        assert by_title['AP50'] == f'{np.mean([x["bbox_mAP_50"] for x in runs.values()]):.3f}'
        if len(runs) > 1:
            ends = [float(x) for x in row[6].split(' to ')]
            np.testing.assert_allclose(ends, interval(maps), atol=0.0005 + 1e-9)
        pairs = values.get((first, mode, row[2]), {})
        if row[0] == first or len(pairs) < 2:
            assert row[-4:] == ['-'] * 4
            continue
        differences = [runs[seed]['bbox_mAP'] - pairs[seed]['bbox_mAP'] for seed in runs]
        assert float(row[-4]) == pytest.approx(np.mean(differences), abs=0.00005 + 1e-9)
        if np.ptp(differences) < 1e-9:  # of detectors that find nothing, say
            assert row[-3:-1] == ['-', '-']
        else:
            ends = [float(x) for x in row[-3].split(' to ')]
            np.testing.assert_allclose(ends, interval(differences), atol=0.00005 + 1e-9)
        assert row[-1] == f'{sum(x > 0 for x in differences)} of {len(differences)}'


@pytest.mark.parametrize('seeds', [[5], [0, 1, 2]])
def test_the_table_is_of_the_runs(seeds):
    rng = np.random.default_rng(0)
    about = dict(
        config='c', classes=['a'], steps=4, batch_size=2, epochs=2, train_images=40, val_images=5
    )
    results = dict(about=about | dict(backbones=dict(base='b.pth', SER='s.pth')), runs=[])
    for name in ('SER', 'random', 'base'):
        for mode in ('frozen', 'unfrozen'):
            for share in (1.0, 0.1):
                for seed in seeds:
                    run = dict(backbone=name, mode=mode, share=share, images=int(40 * share))
                    # All detectors of few images may find nothing.
                    scores = rng.random(3).tolist() if share == 1 else [0.0] * 3
                    run |= zip(('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75'), scores, strict=True)
                    results['runs'].append(run | dict(seed=seed))
    del results['runs'][0 : 2 * len(seeds)]  # SER was not run frozen
    table = report_detectors(results)
    assert_table_follows(results, table)
    assert [row[0] for row in cells(table)[1:6]] == ['base', 'random', 'base', 'SER', 'random']
    assert 'One checkpoint for all seeds: base, SER.' in table
    assert 'Every run takes 4 steps of 2 images' in table


def score_again(cfg, checkpoint):
    """By MMEngine's Runner and its test loop."""
    cfg = deepcopy(cfg)
    cfg.update(load_from=checkpoint, work_dir=f'{cfg.work_dir}_again')
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.experiment_name = checkpoint.replace('/', '_')
    cfg.test_dataloader.persistent_workers = False
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Runner.from_cfg(cfg).test()


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_and_keeps_what_is_done(data):
    work = data.parent / 'work'
    # As a config of many workers, of which somebody wants none: detectors were trained in vain.
    quick = QUICK | {'test_dataloader.persistent_workers': True}
    call = arguments(data, modes=['unfrozen'], shares=[0.5], cfg_options=quick)
    names = [f'{name}={file}' for name, file in call['backbones'].items()]
    options = [f'{key}={value}' for key, value in quick.items()]
    command = [sys.executable, '-m', 'ser_mm.cli.detect', call['config'], '--work-dir', work]
    command += ['--train', call['train'], '--val', call['val'], '--images', call['images']]
    command += ['--backbones', *names, '--modes', 'unfrozen', '--shares', '0.5']
    command += ['--seeds', '0', '1', '--cfg-options', *options]
    first = work / 'runs' / 'early' / 'unfrozen' / 'share0.5' / 'seed0'
    with (data.parent / 'log').open('w') as log:
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | dict(PYTHONPATH=str(ROOT)),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 1800
        while not (first / 'last_checkpoint').is_file():
            assert process.poll() is None, (data.parent / 'log').read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    written = (first / 'epoch_1.pth').stat().st_mtime_ns

    # What the runs that wait are started by, all but one in this process, as it is up already.
    configs = sorted(work.glob('runs/*/*/*/seed?.py'))
    assert len(configs) == 4
    for config in configs[:-1]:
        folder = config.with_suffix('')
        if folder != first:
            train_command([str(config), '--work-dir', str(folder), '--resume'])
    init_default_scope('mmpretrain')
    results = json.loads(compare_detectors(**call).read_text())
    assert (first / 'epoch_1.pth').stat().st_mtime_ns == written
    assert len(results['runs']) == 4
    assert_table_follows(results, (work / 'detection.md').read_text())

    start = torch.load(data.parent / 'early.pth')['state_dict']
    trained = torch.load(first / 'epoch_1.pth', weights_only=False)['state_dict']
    assert any(not torch.equal(trained[key], value) for key, value in start.items())
    run = max(results['runs'], key=lambda x: x['bbox_mAP_50'])  # 0 would be little to compare
    best = work / 'runs' / run['backbone'] / 'unfrozen' / 'share0.5' / f'seed{run["seed"]}'
    again = score_again(Config.fromfile(f'{best}.py'), str(best / 'epoch_1.pth'))
    for metric in ('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75'):
        assert run[metric] == again[f'coco/{metric}']

    edit(data / 'val.json', lambda content: content['annotations'].pop())
    with pytest.raises(ValueError, match='holds a run with other settings'):
        compare_detectors(**call)
