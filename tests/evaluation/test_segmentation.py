"""Segmentation by tokens beside loops and scikit-learn, and on maps whose score is known."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler

from ser_mm.datasets import LoadChannels, LoadReadableImage
from ser_mm.evaluation.data import build_preprocessor
from ser_mm.evaluation.segmentation import (
    _Kept,
    count_classes,
    find_pairs,
    mean_iou,
    patch_shares,
    read_pairs,
    segmentation_by_layer,
)
from tests.support.command import run_command
from tests.support.probed import config, write_checkpoint

SIDE, PATCH = 16, 4


def pictures(count, seed=0):
    """Images of noise, with squares of two brighter classes, and their masks."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=rng)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for i in range(count):
        for label in (1, 2):
            y, x = torch.randint(SIDE - 7, (2,), generator=rng)
            masks[i, y : y + 7, x : x + 7] = label
    masks[:, 0] = 255
    return images + 0.7 * masks.where(masks < 3, 0)[:, None] * torch.tensor([1, -1, 0])[
        :, None, None
    ], masks


def pooled(images):
    return [F.avg_pool2d(images, PATCH), F.avg_pool2d(images[:, :1], PATCH)]


def test_shares_of_patches_by_a_loop():
    _, masks = pictures(2)
    shares = patch_shares(masks, (4, 4), 3)
    for i, y, x in np.ndindex(2, 4, 4):
        patch = masks[i, PATCH * y :, PATCH * x :][:PATCH, :PATCH]
        counted = patch[patch != 255]
        expected = [float((counted == k).double().mean()) for k in range(3)]
        assert shares[i, :, y, x].tolist() == pytest.approx(expected)
    assert patch_shares(torch.full((1, 4, 4), 255), (1, 1), 3).sum() == 0


def test_mean_iou_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, found = rng.integers(4, size=(2, 500))
    counts = np.zeros((6, 6), np.int64)  # two classes are nowhere
    np.add.at(counts, (true, found), 1)
    expected = jaccard_score(true, found, average='macro')
    assert mean_iou(torch.from_numpy(counts)) == pytest.approx(expected)


def test_scores_are_those_of_scikit_learn_and_of_loops():
    (train, known), (val, asked) = pictures(12), pictures(5, seed=1)
    batches = [(train[:7], known[:7]), (train[7:], known[7:])]
    found = segmentation_by_layer(pooled, batches, [(val, asked)], 3)
    assert len(found['linear']) == len(found['nearest']) == 2
    tokens, queries = (
        pooled(x)[0].permute(0, 2, 3, 1).reshape(-1, 3).numpy() for x in (train, val)
    )
    shares = patch_shares(known, (4, 4), 3).permute(0, 2, 3, 1).reshape(-1, 3).numpy()

    scaler = StandardScaler().fit(tokens)
    regression = LogisticRegression(max_iter=1000)
    regression.fit(scaler.transform(tokens), shares.argmax(1))
    scores = regression.predict_log_proba(scaler.transform(queries))
    votes = []
    for query in queries:
        cosine = tokens @ query / np.linalg.norm(tokens, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine)[:30]
        weights = np.exp(cosine[nearest] / 0.02)
        votes.append(weights @ shares[nearest] / weights.sum())
    for name, values in dict(linear=scores, nearest=np.array(votes)).items():
        maps = torch.from_numpy(values).view(5, 4, 4, 3).permute(0, 3, 1, 2)
        labels = F.interpolate(maps, (SIDE, SIDE), mode='bilinear').argmax(1)
        counted = asked != 255
        expected = jaccard_score(asked[counted], labels[counted], average='macro')
        # Where two classes are next to equal, rounding may decide on one pixel of 1200.
        assert found[name][0] == pytest.approx(expected, abs=0.005)
    majority = torch.zeros_like(asked)[counted]
    assert found['floor'] == pytest.approx(
        jaccard_score(asked[counted], majority, average='macro', zero_division=0)
    )
    assert found['floor'] < found['linear'][0] < found['ceiling'] < 1


def test_floor_and_ceiling_are_reached():
    """Maps that know the class of each patch, and that know nothing."""
    masks = torch.randint(3, (20, 4, 4), generator=torch.Generator().manual_seed(0))
    masks = masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    images = masks[:, None].float().repeat(1, 3, 1, 1)

    def maps(x):
        code = F.one_hot(x[:, 0, ::PATCH, ::PATCH].long(), 3).permute(0, 3, 1, 2).float()
        return [50 * code, torch.ones_like(code)]

    found = segmentation_by_layer(maps, [(images, masks)], [(images, masks)], 3)
    # Bilinear scaling moves borders between patches, and nothing else.
    assert 0.75 < found['ceiling'] == found['nearest'][0] < 1
    assert found['linear'][0] == pytest.approx(found['ceiling'], abs=0.02)
    assert found['linear'][1] == found['floor'] < 0.2
    assert found['nearest'][1] < 0.2  # of tokens that are equally near 30 vote, for one class


def test_few_tokens_of_many_images_are_kept(monkeypatch):
    """The same ones, whatever the batches."""
    monkeypatch.setattr('ser_mm.evaluation.segmentation._TOKENS', 50)
    everything = torch.arange(190)
    found = []
    for size in (7, 64, 190):
        kept = _Kept()
        for part in everything.split(size):
            kept.add(part, -part)
        found.append(kept.rows[0].tolist())
        assert found[-1] == (-kept.rows[1]).tolist() == sorted(set(found[-1]))
    assert found[0] == found[1] == found[2] and len(found[0]) == 50


@pytest.mark.parametrize('side', [6, 8, 14, 16])
def test_tokens_of_all_places_are_kept(side):
    """Those at equal distances came from one column where the grid's side is a power of 2."""
    kept = _Kept()
    place = torch.arange(side**2).repeat(2000)
    for part in place.split(64 * side**2):
        kept.add(part)
    (rows,) = kept.rows
    assert len(rows) == 20_000 and kept.seen == len(place)
    for line in (rows % side, rows // side):
        share = 20_000 / side
        # A draw without replacement varies less than a binomial one; 6 deviations.
        assert (line.bincount(minlength=side) - share).abs().max() < 6 * share**0.5


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in dict(train=4, val=2).items():
        for kind in ('images', 'masks'):
            (tmp_path / 'shapes' / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((48, 60), np.uint8)
            mask[10:30, 10 + i : 40] = 1
            mask[:4] = 255
            pixels = (
                rng.integers(60, size=(48, 60, 3), dtype=np.uint8) + 120 * (mask == 1)[..., None]
            )
            Image.fromarray(pixels.astype(np.uint8)).save(
                tmp_path / f'shapes/{split}/images/{i}.jpg'
            )
            Image.fromarray(mask).save(tmp_path / f'shapes/{split}/masks/{i}.png')
    return tmp_path / 'shapes'


def test_pairs_are_read_as_the_network_takes_them(folder, imagenet_tree):
    pairs = find_pairs(folder, 'train')
    assert [x.name for x, _ in pairs] == ['0.jpg', '1.jpg', '2.jpg', '3.jpg']
    assert count_classes(pairs) == 2
    preprocessor = build_preprocessor(config(imagenet_tree))
    load = LoadReadableImage()
    first, last = read_pairs(pairs, (32, 32), preprocessor, batch_size=3, load=load)
    assert first[0].shape == (3, 3, 32, 32) and last[1].shape == (1, 32, 32)
    image = np.asarray(Image.open(pairs[3][0]).resize((32, 32), Image.Resampling.BICUBIC))
    bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
    assert torch.equal(last[0], preprocessor(dict(inputs=[bgr]))['inputs'])
    assert set(last[1].unique().tolist()) == {0, 1, 255}


def test_images_are_loaded_as_the_config_does(folder):
    """By Pillow as 8 bits and in BGR, they were white, or of exchanged colours."""
    (file, mask), *_ = find_pairs(folder, 'train')
    rgb = np.asarray(Image.open(file).resize((30, 24), Image.Resampling.BICUBIC))
    ((found, _),) = read_pairs([(file, mask)], (24, 30), Inputs())  # as of CIFAR, in RGB
    assert np.array_equal(found[0].permute(1, 2, 0), rgb)
    deep = folder / 'deep.png'
    values = np.linspace(30000, 34000, 48 * 60).reshape(48, 60)
    Image.fromarray(values.astype(np.uint16)).save(deep)
    load = LoadChannels(channels=1, dtype='uint16', mean=[32000], std=[1000])
    ((found, _),) = read_pairs([(deep, mask)], (24, 30), Inputs(), load=load)
    whole = torch.from_numpy(load(dict(img_path=str(deep)))['img'])
    assert found.shape == (1, 1, 24, 30) and found.dtype == torch.float32
    # What shrinks by two keeps its mean, and most of its range.
    torch.testing.assert_close(found.mean(), whole.mean(), rtol=0, atol=0.01 * float(whole.std()))
    assert found.max() - found.min() > 0.9 * (whole.max() - whole.min())
    deep.write_text('no image')
    with pytest.raises(ValueError, match='deep.png cannot be read as an image; replace or'):
        list(read_pairs([(deep, mask)], (24, 30), Inputs(), load=LoadReadableImage()))
    load.skip = False
    with pytest.raises(ValueError, match=r'cannot be read as an image \(ValueError: is no image'):
        list(read_pairs([(deep, mask)], (24, 30), Inputs(), load=load))


class Inputs(torch.nn.Module):
    """A preprocessor that leaves pixels as they are."""

    def forward(self, data):
        return dict(inputs=torch.stack(data['inputs']))


def test_mistakes_are_told(folder, imagenet_tree):
    with pytest.raises(FileNotFoundError, match='has no image; put images there'):
        find_pairs(folder, 'test')
    (folder / 'val/masks/1.png').unlink()
    with pytest.raises(
        FileNotFoundError, match=r'1\.png is missing, and 0 more masks; write a PNG'
    ):
        find_pairs(folder, 'val')
    Image.new('L', (3, 3)).save(folder / 'val/masks/1.png')
    with pytest.raises(ValueError, match='is 3 x 3 of mode L, and its image 60 x 48; write the'):
        list(read_pairs(find_pairs(folder, 'val'), (32, 32), None))
    nothing = [(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255))]
    with pytest.raises(ValueError, match='no pixel has a class from 0 to 1'):
        segmentation_by_layer(pooled, nothing, nothing, 2)


def test_command(folder, imagenet_tree, tmp_path, capsys):
    config(imagenet_tree).dump(tmp_path / 'config.py')
    run = tmp_path / 'config.py', write_checkpoint(tmp_path / 'epoch_1.pth')
    options = ['--measures', 'segmentation', '--layers', 1, 4, '--out', tmp_path / 'a.json']
    assert run_command('dense', *run, *options) == 2
    assert "'segmentation' needs masks" in capsys.readouterr().err
    assert run_command('dense', *run, *options, '--masks', folder) is None
    found = json.loads((tmp_path / 'a.json').read_text())['results']['segmentation']
    assert found['classes'] == 2 and len(found['linear']) == 2
    assert found['floor'] < found['ceiling'] < 1
    assert '| mIoU, 2 classes | block 1 | block 4 | pixels |' in (tmp_path / 'a.md').read_text()
