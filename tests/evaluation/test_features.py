"""Features: what is one, on one rank as on two, and when those in the cache are used again."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import one_sentence
from ser_mm.engine.configs import find_config
from ser_mm.evaluation import Embedder, build_backbone, load_features
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.linear import fit_head
from tests.support.algorithms import BACKBONE, PIXELS, RESNET, build
from tests.support.probed import config
from tests.support.rounding import FLOAT32_NETWORK
from tests.support.two_ranks import on_two_ranks


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
    source = CachedFeatures(cfg, checkpoint, cache, batch_size=4)
    head, _, train = fit_head(source, [1.0], epochs=2, probe_batch=8)
    with pytest.raises(SystemExit) as end, one_sentence():
        find_config('none.py')
    return results, head.weight, train, end.value.code


@pytest.mark.slow
def test_two_ranks_extract_what_one_does(imagenet_tree, checkpoint, tmp_path):
    """Of 15 images, so that one rank has more; each image is there once, in its place."""
    ranks = on_two_ranks(_on_rank, str(imagenet_tree), checkpoint, str(tmp_path / 'two'))
    expected, weight, _, sentence = _on_rank(0, str(imagenet_tree), checkpoint, tmp_path / 'one')
    assert sentence.startswith('error: ') and 'none.py' in sentence
    for rank, (results, own, train, own_sentence) in enumerate(ranks):
        for (x, y), (v, w) in zip(results, expected, strict=True):
            torch.testing.assert_close(x, v, **FLOAT32_NETWORK)
            assert len(y) == 15 and torch.equal(y, w)
        # Four steps with rates of 8 / 256 at most, by momentum ten times as much
        close = dict(rtol=0, atol=4 * 10 * 8 / 256 * FLOAT32_NETWORK['atol'])
        torch.testing.assert_close(own, weight, **close)
        assert (train is None) == (rank != 0)  # which fits the head alone
        assert own_sentence == sentence.replace('error', f'error on rank {rank}', 1)
    names = [{file.name for file in (tmp_path / name).glob('[tv]*')} for name in ('one', 'two')]
    assert names[0] == names[1] and len(names[0]) == 3


def test_last_blocks_are_normalized_cls_tokens(checkpoint):
    cfg = config('.')
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        joined = Embedder(cfg, checkpoint, blocks=2).double()(images)
        last = Embedder(cfg, checkpoint).double()(images)
        raw = build_backbone(cfg, checkpoint, out_type='raw', out_indices=[2, 3]).double()
        tokens = raw(images)
    expected = torch.cat([raw.ln1(tokens[0])[:, 0], tokens[1][:, 0]], dim=1)
    torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, joined[:, 48:], rtol=1e-10, atol=1e-10)


def test_a_head_is_copied_to_the_device_of_the_backbone(checkpoint, monkeypatch):
    """The meta device in place of a GPU: it refuses parameters that were left on the CPU."""
    for module in ('backbone', 'features'):
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


def test_one_network_serves_all_data_sets_and_heads(imagenet_tree, checkpoint, tmp_path):
    """The checkpoint is read while it is there, and not again."""
    cfg = config(imagenet_tree)
    copy = tmp_path / 'copy.pth'
    shutil.copy(checkpoint, copy)
    source = CachedFeatures(cfg, str(copy), tmp_path)
    features, labels = source.load('train')
    copy.unlink()
    cfg.evaluation.few = dict(cfg.evaluation.val, indices=3)
    torch.testing.assert_close(source.load('few')[0], features[:3], **FLOAT32_NETWORK)
    heads = [torch.nn.Linear(48, 4) for _ in range(2)]
    for head in heads:
        classes, _ = source.load('val', head)
        first, second = head(features).topk(2, dim=1).values.T
        assert (first - second).min() > 1e-3  # so that rounding decides nothing
        assert torch.equal(classes, head(features).argmax(dim=1))
    assert torch.equal(source.load('val')[0], features)  # the same batch, by the same network


def test_features_of_the_untrained_network_follow_its_weights(imagenet_tree, tmp_path):
    cfg = config(imagenet_tree)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(load_features(cfg, None, 'val', tmp_path)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len(list(tmp_path.iterdir())) == 2
