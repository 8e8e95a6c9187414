"""Probes equal scikit-learn's on the same cached features, on one rank as on two."""

import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from ser_mm.evaluation.command import fit_head, run
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ser_mm.evaluation import (
    Embedder,
    accuracy,
    build_backbone,
    fit_linear_heads,
    knn_votes,
    load_features,
    select_linear_head,
)
from tests.support.algorithms import ALGORITHMS, BACKBONE, PIXELS, RESNET, build
from tests.support.two_ranks import on_two_ranks

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs'),
]


def config(root, **dataset):
    dataset = dict(type='CustomDataset', data_root=str(root), pipeline=PIPELINE, **dataset)
    return Config(
        dict(
            model=ALGORITHMS['mocov3'],
            evaluation={split: dict(dataset, data_prefix='train') for split in ('train', 'val')},
        )
    )


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build(ALGORITHMS['mocov3'])
    path = tmp_path_factory.mktemp('checkpoint') / 'epoch_1.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture(scope='module')
def features(checkpoint, tmp_path_factory):
    """Cached features of photographs, by an untrained network: too few for a perfect fit."""
    init_default_scope('mmpretrain')
    folder = tmp_path_factory.mktemp('features')
    photos = dict(
        type='BundledPhotos',
        data_root=str(folder / 'photos'),
        crop_size=32,
        train_per_picture=40,
        val_per_picture=20,
        pipeline=PIPELINE,
    )
    splits = {split: dict(photos, split=split) for split in ('train', 'val')}
    cfg = Config(dict(model=ALGORITHMS['mocov3'], evaluation=splits))
    (x, y), (v, w) = (load_features(cfg, checkpoint, split, folder) for split in splits)
    reduce = PCA(4, whiten=True, random_state=0).fit(x.numpy())
    return *(torch.from_numpy(reduce.transform(part.numpy())).float() for part in (x, v)), y, w


def test_linear_probe_at_convergence_is_the_logistic_regression(features):
    x, v, y, w = features
    weight, bias = fit_linear_heads(x, y, [1.0], epochs=4000, batch_size=len(x))
    probabilities = (v @ weight[0] + bias[0]).softmax(dim=1).numpy()
    regression = LogisticRegression(C=np.inf, tol=1e-6, max_iter=2000).fit(x.numpy(), y.numpy())
    assert np.abs(probabilities - regression.predict_proba(v.numpy())).max() < 0.02
    agree = probabilities.argmax(1) == regression.predict(v.numpy())
    assert agree.mean() >= 0.99 and 0.2 < regression.score(v.numpy(), w.numpy()) < 0.9


def test_a_head_does_not_depend_on_the_others(features):
    x, _, y, _ = features
    rates = [0.01, 1.0, 1e30]  # the last one diverges
    together = fit_linear_heads(x, y, rates, epochs=3, batch_size=64)
    for i, rate in enumerate(rates[:2]):
        alone = fit_linear_heads(x, y, [rate], epochs=3, batch_size=64)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0])


def test_the_held_out_part_chooses_and_the_choice_is_kept(features, tmp_path):
    x, v, y, w = features
    head, choice = select_linear_head(x, y, tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert (
        choice['learning_rate'] == 1.0 == float(max(choice['held_out'], key=choice['held_out'].get))
    )
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again, same = select_linear_head(x, y, tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert file.stat().st_mtime_ns == written and same == choice
    assert torch.equal(head(v), again(v))
    select_linear_head(x, y, tmp_path, [1.0], epochs=5)
    select_linear_head(x[1:], y[1:], tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match='holdout=0.0001 of 720 training images is 0'):
        select_linear_head(x, y, tmp_path, holdout=0.0001)


def test_knn_is_that_of_scikit_learn(features):
    x, v, y, w = features
    votes = knn_votes(x, y, v, (10, 20, 100), temperature=0.07)
    for k in (10, 20, 100):
        classifier = KNeighborsClassifier(
            k, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07)
        ).fit(x.numpy(), y.numpy())
        share = votes[k].softmax(dim=1).numpy()
        np.testing.assert_allclose(share, classifier.predict_proba(v.numpy()), atol=1e-4)
        expected = classifier.score(v.numpy(), w.numpy())
        assert accuracy(votes[k], w)['top1'] == pytest.approx(expected, abs=1e-9)


def test_accuracy_and_its_interval():
    scores = torch.eye(10)[[0, 1, 2, 3, 4, 5, 6, 7, 9, 9]]
    result = accuracy(scores, torch.arange(10))
    assert result['top1'] == 0.9 and result['images'] == 10
    scores[9] = torch.nan
    result = accuracy(scores, torch.arange(10))
    assert result['top1'] == 0.8
    # Wilson's interval for 8 of 10, by its formula.
    z, p, n = 1.959964, 0.8, 10
    centre, half = (p + z * z / 2 / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    assert result['top1_ci'] == pytest.approx(expected, abs=1e-6)
    votes = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert accuracy(votes, torch.tensor([1]))['top5'] == 0


def test_cache_is_used_again_until_something_changes(imagenet_tree, checkpoint, tmp_path):
    root, cache = tmp_path / 'data', tmp_path / 'cache'
    shutil.copytree(imagenet_tree, root)
    cfg = config(root)

    def files():
        return set(cache.iterdir())

    first, labels = load_features(cfg, checkpoint, 'val', cache)
    assert first.shape == (16, 48) and labels.tolist() == sorted([0, 1, 2, 3] * 4)
    (file,) = files()
    written = file.stat().st_mtime_ns
    # What another extraction writes, or left when it was interrupted, is not taken for features.
    half = file.with_suffix('.part0.npz')
    half.write_bytes(b'half')
    again, _ = load_features(cfg, checkpoint, 'val', cache, batch_size=5)
    assert file.stat().st_mtime_ns == written and torch.equal(first, again)
    file.unlink()
    again, _ = load_features(cfg, checkpoint, 'val', cache)
    assert torch.equal(first, again) and files() == {file, half}

    def is_new(cfg=cfg, checkpoint=checkpoint, **options):
        before = files()
        load_features(cfg, checkpoint, 'val', cache, **options)
        assert len(files() - before) == 1

    weights = torch.load(checkpoint)
    weights['state_dict']['backbone.ln1.bias'] += 1
    torch.save(weights, tmp_path / 'other.pth')
    is_new(checkpoint=str(tmp_path / 'other.pth'))
    is_new(blocks=2)
    other = config(root)
    other.evaluation.val.pipeline[1].crop_size = 40
    is_new(other)
    is_new(config(root, indices=8))
    is_new(head=torch.nn.Linear(48, 4))
    image = next((root / 'train').glob('*/*'))
    image.write_bytes(image.read_bytes() + b'\0')
    is_new()
    shutil.copy(image, image.with_name('z.JPEG'))
    is_new()


def _on_rank(rank, root, checkpoint, cache):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    head = torch.nn.Linear(48, 4)
    cfg = config(root, indices=15)
    results = [
        load_features(cfg, checkpoint, 'val', cache, batch_size=4),
        load_features(cfg, checkpoint, 'val', cache, head=head, batch_size=4),
    ]
    places = dict(cache_dir=cache, blocks=1, batch_size=4, num_workers=0)
    args = Namespace(**places, lrs=[1.0], epochs=2, probe_batch=8)
    head, _, train = fit_head(cfg, checkpoint, args)
    with pytest.raises(SystemExit) as end:
        run(lambda: Config.fromfile('none.py'))
    return results, head.weight, train, end.value.code


@pytest.mark.slow
def test_two_ranks_extract_what_one_does(imagenet_tree, checkpoint, tmp_path):
    """Of 15 images, so that one rank has more; each image is there once, in its place."""
    ranks = on_two_ranks(_on_rank, str(imagenet_tree), checkpoint, str(tmp_path / 'two'))
    expected, weight, _, sentence = _on_rank(0, str(imagenet_tree), checkpoint, tmp_path / 'one')
    assert sentence.startswith('error: ') and 'none.py' in sentence
    for rank, (results, own, train, own_sentence) in enumerate(ranks):
        for (x, y), (v, w) in zip(results, expected, strict=True):
            torch.testing.assert_close(x, v, rtol=1e-5, atol=1e-5)
            assert len(y) == 15 and torch.equal(y, w)
        torch.testing.assert_close(own, weight, rtol=1e-4, atol=1e-5)
        assert (train is None) == (rank != 0)  # which fits the head alone
        assert own_sentence == sentence.replace('error', f'error on rank {rank}', 1)
    names = [{file.name for file in (tmp_path / name).glob('[tv]*')} for name in ('one', 'two')]
    assert names[0] == names[1] and len(names[0]) == 3


def test_last_blocks_are_normalized_cls_tokens(checkpoint):
    cfg = config('.')
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        joined = Embedder(cfg, checkpoint, blocks=2)(images)
        raw = build_backbone(cfg, checkpoint, out_type='raw', out_indices=[2, 3])
        tokens = raw(images)
    assert torch.equal(joined, torch.cat([raw.ln1(tokens[0])[:, 0], tokens[1][:, 0]], dim=1))
    assert torch.equal(Embedder(cfg, checkpoint)(images), joined[:, 48:])


def test_a_head_is_copied_to_the_device_of_the_backbone(checkpoint, monkeypatch):
    """The meta device in place of a GPU: it refuses parameters that were left on the CPU."""
    for module in ('networks', 'features'):
        monkeypatch.setattr(f'ser_mm.evaluation.{module}.get_device', lambda: 'meta')
    head = torch.nn.Linear(48, 4)
    images = torch.empty(2, 3, 32, 32, device='meta')
    classes = Embedder(config('.'), checkpoint, head=head)(images)
    assert classes.is_meta and classes.shape == (2,)
    assert not head.weight.is_meta


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='VisionTransformer', arch=BACKBONE['arch'], img_size=32, patch_size=8),
        dict(type='ResNet', depth=18, stem_channels=8, base_channels=8),
        {**RESNET, 'ser_layer': None},
    ],
    ids=lambda backbone: backbone['type'],
)
def test_any_backbone_from_a_checkpoint_of_a_classifier(backbone, tmp_path):
    model = dict(type='ImageClassifier', backbone=backbone, head=None)
    classifier = build(dict(model, data_preprocessor=dict(type='ClsDataPreprocessor', **PIXELS)))
    weights = classifier.state_dict() | {'head.fc.weight': torch.zeros(3, 5)}
    cfg = Config(dict(model=model))
    images = torch.randn(2, 3, 32, 32)
    expected = Embedder(cfg, None)(images).shape
    for prefix in ('backbone.', ''):
        held = {k: v for k, v in weights.items() if k.startswith('backbone.')}
        torch.save({k.replace('backbone.', prefix): v for k, v in held.items()}, tmp_path / 'x.pth')
        network = build_backbone(cfg, str(tmp_path / 'x.pth'))
        assert not network.training
        for name, value in network.state_dict().items():
            assert torch.equal(value, weights[f'backbone.{name}'])
    torch.save(weights, tmp_path / 'whole.pth')
    assert Embedder(cfg, str(tmp_path / 'whole.pth'))(images).shape == expected
    if backbone['type'] != 'VisionTransformer':
        with pytest.raises(ValueError, match='blocks=4: .* for a ViT only'):
            Embedder(cfg, None, blocks=4)


@pytest.mark.parametrize(
    'backbone, width',
    [
        (dict(type='DistilledVisionTransformer', arch='deit-tiny', img_size=32), 2 * 192),
        (
            dict(
                type='MlpMixer',
                arch=dict(embed_dims=32, num_layers=1, tokens_mlp_dims=8, channels_mlp_dims=8),
                img_size=32,
            ),
            32,
        ),
        (dict(type='Conformer', arch='tiny'), 256 + 384),
    ],
)
def test_outputs_of_other_shapes(backbone, width):
    network = Embedder(Config(dict(model=dict(type='ImageClassifier', backbone=backbone))))
    with torch.no_grad():
        vectors = network(torch.randn(2, 3, 32, 32))
    assert vectors.shape == (2, width) and vectors.isfinite().all()


def test_more_blocks_than_there_are(checkpoint):
    with pytest.raises(ValueError, match=r'blocks=3: \[CLS\] is in the last 2 blocks'):
        Embedder(config('.'), checkpoint, blocks=3)
    plain = dict(type='VisionTransformer', arch='deit-tiny', img_size=32)
    cfg = Config(dict(model=dict(type='ImageClassifier', backbone=plain)))
    with pytest.raises(ValueError, match='the last 12 blocks'):
        Embedder(cfg, blocks=13)


@pytest.mark.parametrize(
    'options', [('--k', '0'), ('--epochs', '0'), ('--temperature', '-1'), ('--lrs', '0')]
)
def test_numbers_that_make_no_sense(options, capsys):
    assert tool('probe', 'a.py', 'b.pth', *options) == 2
    assert f'argument {options[0]}: {options[1]} is not positive' in capsys.readouterr().err


def test_what_no_evaluation_can_start_from(checkpoint, tmp_path, imagenet_tree):
    with pytest.raises(ValueError, match="MAEViT' masks its images"):
        build_backbone(Config(dict(model=dict(type='MAE', backbone=dict(type='MAEViT')))))
    with pytest.raises(ValueError, match='no `backbone`'):
        build_backbone(Config(dict(model=dict(type='TimmClassifier', model_name='x'))))
    cfg = config(imagenet_tree)
    with pytest.raises(ValueError, match=r'evaluation\.test is not in'):
        load_features(cfg, checkpoint, 'test', tmp_path)
    cfg.model.algorithm.backbone.out_type = 'raw'
    with pytest.raises(ValueError, match=r'\(16, 17, 48\) for 16 images'):
        load_features(cfg, checkpoint, 'val', tmp_path)


def tool(name, *args):
    """Run a tool in this process; returns what it exits with."""
    path = Path(__file__).parents[1] / 'tools' / f'{name}.py'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, args)])
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as end:
            return end.code


def test_tool_reports_and_speaks_one_sentence(imagenet_tree, checkpoint, tmp_path, capsys):
    cfg = tmp_path / 'config.py'
    config(imagenet_tree).dump(cfg)
    places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
    threads = cv2.getNumThreads()
    cv2.setNumThreads(3)
    assert tool('probe', cfg, checkpoint, '--epochs', 2, '--k', 1, *places) is None
    assert cv2.getNumThreads() == 1  # as in training
    cv2.setNumThreads(threads)
    results = Config.fromfile(tmp_path / 'out' / 'probe.json').results
    assert results['1-NN'].top1 == 1 and results['linear probe'].images == 16
    assert '| 1-NN' in capsys.readouterr().out

    def refusal(*options, checkpoint=checkpoint):
        code = tool('probe', cfg, checkpoint, *options, *places)
        assert code.startswith('error: ') and '\n' not in code
        return code

    missing = refusal('--cfg-options', 'evaluation.val.data_root=nowhere')
    assert "evaluation.val.data_root = 'nowhere'" in missing
    assert 'none.pth' in refusal(checkpoint='none.pth')
    assert 'evaluation.val is not in' in refusal('--cfg-options', 'evaluation.val=None')
    other = tmp_path / 'other'
    (other / 'train' / 'n1').mkdir(parents=True)
    shutil.copy(next(imagenet_tree.glob('train/*/*')), other / 'train' / 'n1')
    odd = refusal('--cfg-options', f'evaluation.val.data_root={other}')
    assert 'different classes: n00000000 and 4 more' in odd
