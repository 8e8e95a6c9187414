"""What is recorded of a view's draws: all of it, without a change to images or random numbers."""

import copy
import pickle
import random

import mmcv
import numpy as np
import pytest
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.datasets.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

import ser_mm  # noqa: F401  registers the transforms
from ser_mm.datasets.transforms.recording import RecordedView
from ser_mm.draws import COLUMNS
from tests.support.paths import ROOT
from tests.support.policies import of_mmpretrain

init_default_scope('mmpretrain')
CFG = Config.fromfile(ROOT / 'configs/mocov3_vits16.py')
VIEWS = [[dict(view[0], scale=48), *view[1:]] for view in (CFG.view_pipeline1, CFG.view_pipeline2)]


def view(transforms):
    return Compose(copy.deepcopy(list(transforms)))


def seed(value):
    np.random.seed(value)
    random.seed(value)


def image(height=90, width=120, value=0):
    return np.random.default_rng(value).integers(0, 256, (height, width, 3), np.uint8)


def streams():
    return np.random.rand(), random.random()


@pytest.mark.parametrize('transforms', VIEWS)
def test_images_and_random_numbers_are_those_without_a_record(transforms):
    plain, recorded = view(transforms), RecordedView(view(transforms))
    for i in range(30):
        seed(i)
        expected = plain(dict(img=image()))['img'], streams()
        seed(i)
        results, _ = recorded(dict(img=image()))
        assert np.array_equal(results['img'], expected[0]) and streams() == expected[1]
    assert not any('_cache' in vars(x) for x in recorded.all)
    pickle.loads(pickle.dumps(recorded))(dict(img=image()))


def replay(img, row, brightness, hue_range, sigma_max):
    """The pixels of a view from its row alone, by the functions below MMPretrain's transforms."""
    height, width = img.shape[:2]
    top, bottom = row['top'] * height, (row['top'] + row['height']) * height
    left, right = row['left'] * width, (row['left'] + row['width']) * width
    box = np.rint([left, top, right, bottom]) - [0, 0, 1, 1]
    img = mmcv.imcrop(img, box)
    img = mmcv.imresize(img, (48, 48), interpolation='bilinear', backend='pillow')
    if row['jitter']:
        for i in range(4):
            step = round(3 * row[f'order_{i}'])
            if step == 0:
                img = mmcv.adjust_brightness(img, 1 + row['brightness'] * brightness, 'pillow')
            elif step == 1:
                img = mmcv.adjust_contrast(img, 1 + row['contrast'] * brightness, 'pillow')
            elif step == 2:
                img = mmcv.adjust_color(
                    img, alpha=1 + row['saturation'] * brightness / 2, backend='pillow'
                )
            else:
                img = mmcv.adjust_hue(img, row['hue'] * hue_range, 'pillow')
    if row['gray']:
        grey = (img * np.array([0.114, 0.587, 0.2989]) / 0.9999).sum(2, keepdims=True)
        img = grey.astype(np.uint8).repeat(3, 2)
    if row['blur']:
        blur = GaussianBlur(radius=float(row['sigma'] * sigma_max), prob=1.0)
        img = blur(dict(img=img))['img']
    if row['solarize']:
        threshold = 256 * (1 - row['solarize'])
        img = np.where(img < threshold, img, 255 - img)
    return img[:, ::-1] if row['flip'] else img


@pytest.mark.parametrize('transforms', VIEWS)
def test_faster_transforms_leave_the_record_of_those_of_mmpretrain(transforms):
    fast, theirs = (RecordedView(view(x)) for x in (transforms, of_mmpretrain(transforms)))
    assert [type(x) for x in fast.all] != [type(x) for x in theirs.all]
    for i in range(30):
        rows = []
        for recorded in (fast, theirs):
            seed(i)
            rows += [recorded(dict(img=image()))[1], recorded(dict(img=image(33, 47)), True)[1]]
        assert np.array_equal(rows[:2], rows[2:])


@pytest.mark.parametrize('transforms', of_mmpretrain(VIEWS))
def test_the_record_makes_the_same_pixels_again(transforms):
    """Of float32: factors are off by 1e-7 of themselves, so a value may fall on the other side of
    a whole grey level, and one that solarizing turns over goes far."""
    recorded = RecordedView(view(transforms))
    rows = []
    for i in range(40):
        seed(i)
        results, values = recorded(dict(img=image(value=i)))
        rows.append(dict(zip(COLUMNS, values.astype(float), strict=True)))
        again = replay(image(value=i), rows[-1], 0.8, 0.2, 2.0)
        off = np.abs(again.astype(int) - results['img'])
        assert (off > 2).mean() < 1e-3
    for name in ('flip', 'jitter', 'gray'):
        assert {row[name] for row in rows} == {0, 1}
    assert all(abs(row[name]) <= 0.5 for row in rows for name in ('brightness', 'contrast', 'hue'))


def test_off_states():
    """What does nothing: the whole image, factors at no change, order 0 1 2 3."""
    _, row = RecordedView(view([dict(type='RandomFlip', prob=0.0)]))(dict(img=image()))
    row = dict(zip(COLUMNS, row.tolist(), strict=True))
    assert (row['height'], row['width']) == (1, 1)
    assert [round(3 * row[f'order_{i}']) for i in range(4)] == [0, 1, 2, 3]
    rest = set(COLUMNS) - {'height', 'width'} - {f'order_{i}' for i in range(4)}
    assert not any(row[name] for name in rest)


def test_pairs_share_crop_jitter_and_gray_and_nothing_else():
    recorded = RecordedView(view(VIEWS[1]))
    shared = [i for i, name in enumerate(COLUMNS) if name not in ('flip', 'blur', 'sigma')]
    shared.remove(COLUMNS.index('solarize'))
    different = set()
    for i in range(40):
        seed(i)
        first, row = recorded(dict(img=image()))
        second, other = recorded(dict(img=image()), as_before=True)
        assert np.array_equal(row[shared], other[shared])
        different |= set(np.flatnonzero(row != other).tolist())
    names = {COLUMNS[i] for i in different}
    assert names == {'flip', 'blur', 'sigma', 'solarize'}


def test_pairs_share_a_jitter_that_is_applied_together_with_a_blur():
    jitter = dict(type='ColorJitter', brightness=0.4)
    blur = dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=0.5)
    recorded = RecordedView(view([dict(type='RandomApply', transforms=[jitter, blur], prob=0.5)]))
    jitters, sigmas = set(), set()
    for i in range(40):
        seed(i)
        rows = [recorded(dict(img=image()), as_before=v == 1)[1] for v in range(2)]
        first, second = (dict(zip(COLUMNS, row.tolist(), strict=True)) for row in rows)
        assert first['jitter'] == second['jitter']
        assert first['brightness'] == second['brightness']
        jitters.add(first['jitter'])
        sigmas.add(first['sigma'] == second['sigma'])
    assert jitters == {0, 1} and sigmas == {False, True}


def test_ranges_of_one_value():
    jitter = dict(type='ColorJitter', brightness=(1.25, 1.25))
    blur = dict(type='GaussianBlur', magnitude_range=(0.0, 0.0), prob=1.0)
    _, row = RecordedView(view([jitter, blur]))(dict(img=image()))
    row = dict(zip(COLUMNS, row.tolist(), strict=True))
    assert (row['brightness'], row['blur'], row['sigma']) == (0.25, 1, 0)


def test_a_pair_of_sizes_shares_the_crop_in_shares_of_the_image():
    crop = dict(type='RandomResizedCrop', scale=32)
    recorded = RecordedView(view([crop]))
    for i in range(30):
        seed(i)
        _, row = recorded(dict(img=image(90, 120)))
        results, other = recorded(dict(img=image(33, 47)), as_before=True)
        assert results['img'].shape == (32, 32, 3)
        # rounded to a pixel of the smaller image, at either end
        assert np.abs(row[:4] - other[:4]).max() <= 1 / 33 + 1e-6
        assert other[0] + other[2] <= 1 + 1e-6 and other[1] + other[3] <= 1 + 1e-6


def test_predicting_nothing_costs_what_the_policy_says():
    """Mean squares of AugSelf's labels: crop 0.046 and colour 0.133 (p 0.8), as measured elsewhere.

    Colour in closed form: the difference of two uniforms on [-1/2, 1/2], each 0 at times, has the
    variance 0.8 / 12 + 0.8 / 12. Five deviations of 1,500 draws of four columns each.
    """
    crop = dict(type='RandomResizedCrop', scale=8)
    jitter = dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    apply = dict(type='RandomApply', transforms=[jitter], prob=0.8)
    recorded = RecordedView(view([crop, apply]))
    seed(0)
    small = image(375, 500)
    recorded.pipeline.transforms = [recorded.crop, Draw(recorded.kinds[ColorJitter], 0.8)]
    rows = np.array([recorded(dict(img=small))[1] for _ in range(1500)], dtype=float)
    columns = [COLUMNS.index(k) for k in ('brightness', 'contrast', 'saturation', 'hue')]
    squares = ((rows[::2] - rows[1::2])[:, columns] ** 2).mean(1)
    assert abs(squares.mean() - 0.8 / 6) < 5 * squares.std() / len(squares) ** 0.5
    centre = np.stack([rows[:, 0] + rows[:, 2] / 2, rows[:, 1] + rows[:, 3] / 2], 1)
    boxes = np.concatenate([centre, rows[:, 2:4]], 1)
    squares = ((boxes[::2] - boxes[1::2]) ** 2).mean(1)
    assert abs(squares.mean() - 0.046) < 5 * squares.std() / len(squares) ** 0.5


class Draw:
    """Draws as a jitter in RandomApply does, and leaves the image alone, for speed."""

    def __init__(self, jitter, prob):
        self.jitter, self.prob = jitter, prob

    def __call__(self, results):
        if np.random.rand() < self.prob:
            self.jitter._rand_params()
        return results


@pytest.mark.parametrize(
    'transforms, message',
    [
        ([dict(type='RandomFlip', prob=0.5), dict(type='RandomResizedCrop', scale=8)], 'begin'),
        ([dict(type='Rotate', angle=30.0)], 'Rotate draws cannot be recorded'),
        ([dict(type='RandomFlip', prob=0.5)] * 2, 'RandomFlip stands twice'),
        (
            [
                dict(
                    type='RandomApply',
                    transforms=[dict(type='RandomResizedCrop', scale=8)],
                    prob=0.5,
                )
            ],
            'RandomResizedCrop is in RandomApply',
        ),
        ([dict(type='RandomFlip', prob=0.5, direction='vertical')], "direction='horizontal'"),
    ],
)
def test_what_cannot_be_recorded_is_named(transforms, message):
    with pytest.raises(ValueError, match=message):
        RecordedView(view(transforms))


def test_a_list_of_one_direction_is_recorded():
    flip = dict(type='RandomFlip', prob=1.0, direction=['horizontal'])
    recorded = RecordedView(view([flip]))
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    made, row = recorded(dict(img=image), False)
    assert (made['img'] == image[:, ::-1]).all() and row[COLUMNS.index('flip')] == 1


def test_mmcv_keeps_what_the_recorder_reads():
    """Names that MMCV and MMPretrain do not promise."""
    from mmcv.transforms.utils import cache_randomness

    for kind, name in [(RandomResizedCrop, 'rand_crop_params'), (ColorJitter, '_rand_params')]:
        assert isinstance(vars(kind)[name], cache_randomness)
