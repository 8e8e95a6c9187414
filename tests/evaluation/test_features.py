"""Features: what is one, on one rank as on two, and when those in the cache are used again."""

import io
import shutil

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import one_sentence
from ser_mm.engine.configs import find_config
from ser_mm.evaluation import Embedder, build_backbone, knn_probe, load_features
from ser_mm.evaluation.data import spaced_images
from ser_mm.evaluation.features import CachedFeatures, stamp_images
from ser_mm.evaluation.linear import fit_head
from tests.support.algorithms import BACKBONE, PIXELS, RESNET, build
from tests.support.probed import config
from tests.support.rounding import FLOAT32_NETWORK
from tests.support.small_images import OwnCIFAR, write_cifar
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
    again, _ = load_features(cfg, checkpoint, 'val', cache, batch_size=5)
    assert file.stat().st_mtime_ns == written and torch.equal(first, again)
    file.unlink()
    again, _ = load_features(cfg, checkpoint, 'val', cache)
    assert torch.equal(first, again) and files() == {file}

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


def test_a_damaged_cache_is_told_and_made_again(imagenet_tree, checkpoint, tmp_path, capsys):
    """Cut off at any length, or another file under its name."""
    cfg = config(imagenet_tree)
    source = CachedFeatures(cfg, checkpoint, tmp_path)
    features, labels = source.load('val')
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    arrays = dict(np.load(file))
    damaged = [whole[:length] for length in range(0, len(whole), len(whole) // 5)]
    damaged += [whole[:-1], b'text', whole[:300] + b'xxxx' + whole[304:]]

    def saved(arrays):
        held = io.BytesIO()
        np.savez(held, **arrays)
        return held.getvalue()

    damaged.append(saved({k: v for k, v in arrays.items() if k != 'labels'}))
    damaged.append(saved({**arrays, 'features': arrays['features'][1:]}))
    damaged.append(saved({**arrays, 'about': np.array('other')}))
    for content in damaged:
        file.write_bytes(content)
        capsys.readouterr()
        found = source.load('val')
        assert torch.equal(found[0], features) and torch.equal(found[1], labels)
        told = [line for line in capsys.readouterr().out.splitlines() if str(file) in line]
        assert len(told) == 1 and 'it is made again' in told[0]
        assert list(tmp_path.iterdir()) == [file] and dict(np.load(file)).keys() == arrays.keys()
    source.load('val')
    assert 'made again' not in capsys.readouterr().out


def test_a_replaced_image_of_the_same_name_and_size_is_noticed(imagenet_tree, checkpoint, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(imagenet_tree, root)
    train, labels = load_features(config(root), checkpoint, 'train', tmp_path / 'cache')
    assert knn_probe(train, labels, train, labels, k=1) == 1
    one, *_, other = sorted((root / 'train').glob('*/*'))
    size = max(file.stat().st_size for file in (one, other))
    contents = [file.read_bytes().ljust(size, b'\0') for file in (one, other)]
    for file, content in zip((one, other), contents, strict=True):
        file.write_bytes(content)
    load_features(config(root), checkpoint, 'val', tmp_path / 'cache')
    for file, content in zip((one, other), reversed(contents), strict=True):
        file.write_bytes(content)  # the same sizes, the other one's image
    val, _ = load_features(config(root), checkpoint, 'val', tmp_path / 'cache')
    assert knn_probe(train, labels, val, labels, k=1) == 14 / 16


@pytest.fixture
def reads(monkeypatch):
    """Paths of the images that were read."""
    found, load = [], LoadImageFromFile.transform

    def counted(self, results):
        found.append(results['img_path'])
        return load(self, results)

    monkeypatch.setattr(LoadImageFromFile, 'transform', counted)
    return found


@pytest.mark.parametrize('num_workers', [0, 2])
def test_unreadable_images_are_named_and_the_others_are_kept(
    num_workers, imagenet_tree, checkpoint, tmp_path, reads
):
    root, cache = tmp_path / 'data', tmp_path / 'cache'
    shutil.copytree(imagenet_tree, root)
    cfg = config(root)
    options = dict(batch_size=4, num_workers=num_workers)
    expected, _ = load_features(cfg, checkpoint, 'val', tmp_path / 'other', **options)
    files = sorted((root / 'train').glob('*/*'))
    odd = [files[5], files[10]]
    contents = [file.read_bytes() for file in odd]
    odd[0].write_bytes(contents[0][:100])
    odd[1].write_bytes(b'')
    with pytest.raises(ValueError, match='evaluation.val: 2 of 16 images cannot be read') as error:
        load_features(cfg, checkpoint, 'val', cache, **options)
    assert all(f'{file} (' in str(error.value) for file in odd)
    assert f'The others are kept in {cache}' in str(error.value)
    with pytest.raises(ValueError, match=f'1 of 16 images cannot be read: {odd[1]}'):
        odd[0].write_bytes(contents[0])
        load_features(cfg, checkpoint, 'val', cache, **options)
    odd[1].write_bytes(contents[1])
    reads.clear()
    features, labels = load_features(cfg, checkpoint, 'val', cache, **options)
    assert reads == ([] if num_workers else [str(odd[1])])  # workers count for themselves
    torch.testing.assert_close(features, expected, **FLOAT32_NETWORK)
    assert labels.tolist() == sorted([0, 1, 2, 3] * 4)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_unreadable_image_of_a_score_is_named(num_workers, imagenet_tree, tmp_path):
    shutil.copytree(imagenet_tree, tmp_path / 'data')
    file = sorted((tmp_path / 'data' / 'train').glob('*/*'))[4]
    file.write_bytes(b'text')
    images = spaced_images(config(tmp_path / 'data'), 'val', 4, num_workers=num_workers)
    with pytest.raises(ValueError, match=rf'val: 1 of 4 images cannot be read: {file} \('):
        list(images)


def test_what_is_extracted_before_an_interruption_is_kept(
    imagenet_tree, checkpoint, tmp_path, reads, monkeypatch
):
    cfg = config(imagenet_tree)
    source = CachedFeatures(cfg, checkpoint, tmp_path / 'cache', batch_size=4)
    forward, calls = Embedder.forward, []

    def interrupted(self, images):
        calls.append(images)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Embedder, 'forward', interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.load('val')
    (share,) = (tmp_path / 'cache').iterdir()
    reads.clear()
    features, _ = source.load('val')
    assert len(reads) == 8
    (file,) = (tmp_path / 'cache').iterdir()
    expected, _ = load_features(cfg, checkpoint, 'val', tmp_path / 'other', batch_size=4)
    assert file != share and torch.equal(features, expected)  # the same batches


def test_a_damaged_share_is_removed_and_told(imagenet_tree, checkpoint, tmp_path, capsys):
    root, cache = tmp_path / 'data', tmp_path / 'cache'
    shutil.copytree(imagenet_tree, root)
    file = next((root / 'train').glob('*/*'))
    content = file.read_bytes()
    file.write_bytes(b'')
    with pytest.raises(ValueError, match='1 of 16 images cannot be read'):
        load_features(config(root), checkpoint, 'val', cache)
    (share,) = cache.iterdir()
    share.write_bytes(share.read_bytes()[:500])
    file.write_bytes(content)
    features, _ = load_features(config(root), checkpoint, 'val', cache)
    assert f'{share} cannot be read' in capsys.readouterr().out
    assert len(features) == 16 and share not in cache.iterdir()


def test_where_no_image_can_be_read_one_batch_tells(imagenet_tree, checkpoint, tmp_path, reads):
    cfg = config(imagenet_tree)
    cfg.evaluation.val.pipeline[1] = dict(type='LoadImageFromFile', imdecode_backend='tifffile')
    with pytest.raises(ValueError, match='4 of 16 images cannot be read') as error:
        load_features(cfg, checkpoint, 'val', tmp_path / 'cache', batch_size=4)
    assert len(set(reads)) == 4 and error.value.__cause__ is not None
    assert 'kept' not in str(error.value) and not (tmp_path / 'cache').exists()


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


@torch.no_grad()
def test_a_network_that_diverged_is_refused(imagenet_tree, checkpoint, tmp_path):
    """Its figures were 0, or the share of the first class."""
    source = CachedFeatures(config(imagenet_tree), checkpoint, tmp_path / 'cache')
    next(source.network.parameters()).fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite; the training of this checkpoint has div'):
        source.load('val')
    with pytest.raises(ValueError, match='not finite'):
        source.load('val', torch.nn.Linear(48, 4))


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
    with pytest.raises(ValueError, match='blocks=0: one of the last blocks is needed'):
        Embedder(config('.'), checkpoint, blocks=0)
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


def test_pixels_without_a_file_tell_themselves_apart(tmp_path):
    """As those of CIFAR: other pixels of the same labels were taken for the same images."""
    stamps = []
    for seed in (0, 0, 1):
        dataset = OwnCIFAR(str(write_cifar(tmp_path, seed=seed)), serialize_data=False)
        stamps.append(stamp_images(dataset))
    assert stamps[0] == stamps[1] and len(set(stamps[0] + stamps[2])) == 20


def test_an_untrained_network_is_made_without_a_line_for_each_parameter(caplog):
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel('INFO')
    try:
        build_backbone(config('.'))
        assert not caplog.records
        logger.info('as before')
        assert len(caplog.records) == 1
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
