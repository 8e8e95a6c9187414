"""Faster transforms: the law and the draws of MMPretrain's, its pixels, and fewer copies."""

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from ser_mm.datasets import FastMultiView, FastRandomResizedCrop
from tests.support.fast_views import PHOTOS, build, crop, jitter, pairs, seed, small
from tests.support.paths import ROOT
from tests.support.policies import of_mmpretrain

CONFIG = Config.fromfile(ROOT / 'configs' / 'mocov3_vits16.py')


def check_crops(transform, config):
    """Boxes exactly, and pixels within 2 grey levels.

    Both libraries filter rows first, round to whole levels, and filter columns. torch keeps weights
    in 15 bits: with 5 times the largest weight for the sum of all, values are off by 255 * 5 / 2^15
    = 0.04. That is a level where a value is rounded the other way. Weights blow it up by 1.3 in the
    second direction: at most 1.34 before rounding, 2 after. In the mean, 4 % of the values of the
    first direction are off, and of those of the second, 0.04 + 1.3 * 0.04 = 0.1.

    Values stay within 128 +- 63, which a kernel whose weights add up to 1.3 in absolute values
    cannot take out of [0, 255] in two directions, so that nothing is cut off.
    """
    images = [(64 + x / 2).clip(65, 191).astype(np.uint8) for x in PHOTOS]
    for _, ours, theirs in pairs(transform, config, images, draws=8):
        off = np.abs(ours - theirs)
        assert off.max() <= 2 and off.mean() <= 0.1


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('area', [(0.002, 0.02), (0.08, 1.0), (0.9, 1.0)])
def test_crops_are_those_of_mmpretrain(interpolation, area):
    config = crop(interpolation=interpolation, crop_ratio_range=area)
    check_crops(config, config)


class NotAntialiased(FastRandomResizedCrop):
    def transform(self, results):
        top, left, height, width = self.rand_crop_params(results['img'])
        image = torch.from_numpy(results['img'][top : top + height, left : left + width].copy())
        image = image.permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image, self.scale, mode=self.interpolation)
        results['img'] = image[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        return results


class OffByOne(FastRandomResizedCrop):
    def rand_crop_params(self, image):
        top, left, height, width = super().rand_crop_params(image)
        return max(top - 1, 0), left, height, width


@pytest.mark.parametrize(
    'fault',
    [
        crop(interpolation='bilinear'),
        crop(interpolation='bicubic', crop_ratio_range=(0.1, 1.0)),
        crop(interpolation='bicubic', aspect_ratio_range=(0.7, 4 / 3)),
        NotAntialiased((64, 56), interpolation='bicubic'),
        OffByOne((64, 56), interpolation='bicubic'),
    ],
    ids=['bilinear', 'smallest area', 'aspect ratio', 'not antialiased', 'a pixel beside'],
)
def test_crops_of_another_kind_would_be_seen(fault):
    with pytest.raises(AssertionError):
        check_crops(fault, crop(interpolation='bicubic'))


def test_crops_of_the_size_that_they_get_are_exact_and_new():
    image = PHOTOS[0][:64, :56].copy()
    for frozen in (image, image[:, ::-1], np.frombuffer(image.tobytes(), np.uint8)):
        frozen = frozen.reshape(image.shape)
        transform = build(crop(crop_ratio_range=(1, 1), aspect_ratio_range=(56 / 64, 56 / 64)))
        made = transform(dict(img=frozen))['img']
        assert np.array_equal(made, frozen) and not np.shares_memory(made, frozen)


# Whole policies


@pytest.mark.parametrize('view', [0, 1])
def test_views_of_the_configs_are_those_of_mmpretrain(view):
    """In the mean 1 level off for the hue, which a colour's other steps blow up by 1.4 * 1.4 * 1.4
    at most, 1 for cutting off in each of six others, so 9; a value beside the threshold of
    solarization may go far, and a grey or an even colour has no hue."""
    policy = [CONFIG.view_pipeline1, CONFIG.view_pipeline2][view].copy()
    policy[0] = dict(policy[0], scale=64)
    ours = dict(type='Compose', transforms=policy)
    for _, fast, theirs in pairs(ours, ours, PHOTOS, draws=10):
        assert np.abs(fast - theirs).mean() < 9
        assert np.median(np.abs(fast - theirs)) <= 2


def test_shipped_configs_name_them_and_baselines_do_as_well():
    for name in ('mocov3_vits16', 'ser_mocov3_vits16', 'barlowtwins_r50', 'ser_dino_vits16'):
        cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        _, views, pack = cfg.train_dataloader.dataset.pipeline
        assert pack.type == 'FastPackInputs'
        assert views.type == ('FastMultiView' if 'ser' not in name else 'EquivariantViewPipeline')
        for view in views.transforms:
            kinds = [x.get('transforms', [x])[0].type for x in view]
            assert all(kind.startswith('Fast') for kind in kinds), kinds


def test_flips_and_packed_views_are_those_of_mmpretrain():
    flip = dict(type='FastRandomFlip', prob=0.5)
    images = small()
    flipped = sum(
        np.array_equal(ours, theirs) and not np.array_equal(ours, image)
        for image, ours, theirs in pairs(flip, flip, images, draws=10)
    )
    assert 10 < flipped < 30
    for _, ours, theirs in pairs(flip, flip, images, draws=3):
        assert np.array_equal(ours, theirs)
    for direction in ('vertical', 'diagonal'):
        config = dict(flip, direction=direction)
        assert all(
            np.array_equal(ours, theirs) for _, ours, theirs in pairs(config, config, images)
        )
    pack, other = (build(dict(type=kind)) for kind in ('FastPackInputs', 'PackInputs'))
    grey, record = images[0][..., 0], torch.tensor([-1, -1])
    views = [images[0], images[1][:, ::-1], images[2].astype(np.float32), grey, record]
    for single in (views, images[0]):
        results = dict(img=single, img_path='x', ori_shape=(1, 2), gt_label=3)
        found, expected = pack(dict(results)), other(dict(results))
        assert found['data_samples'].img_path == 'x' and found['data_samples'].gt_label == 3
        for x, y in zip(found['inputs'], expected['inputs'], strict=True):
            assert torch.equal(x, y) and x.is_contiguous()


def test_boxes_are_flipped_with_the_image():
    for kind in ('FastRandomFlip', 'RandomFlip'):
        results = dict(img=PHOTOS[0], gt_bboxes=np.array([[0.0, 0, 10, 20]]))
        out = build(dict(type=kind, prob=1.0))(results)
        assert out['gt_bboxes'].tolist() == [[PHOTOS[0].shape[1] - 10, 0, PHOTOS[0].shape[1], 20]]


# Copies


class Counted(np.ndarray):
    """An image that counts its deep copies."""

    copies = 0

    def __deepcopy__(self, memo):
        Counted.copies += 1
        return super().__deepcopy__(memo)


FLIP = dict(type='FastRandomFlip', prob=0.5)
THIRD_PARTY_CROP = dict(type='CenterCrop', crop_size=64)
COPIES = {
    'crops': ([[crop(scale=64), FLIP]] * 2, 0),
    "MMPretrain's crops": ([[of_mmpretrain(crop(scale=64)), FLIP]] * 2, 0),
    'a part of the image': ([[crop(scale=64), FLIP], [THIRD_PARTY_CROP, FLIP]], 1),
    'the image itself': ([[FLIP], [FLIP]], 2),
}


@pytest.mark.parametrize('name', COPIES)
@pytest.mark.parametrize('kind', ['FastMultiView', 'EquivariantViewPipeline'])
def test_images_are_copied_for_views_that_may_write_into_them(kind, name, monkeypatch):
    views, expected = COPIES[name]
    options = dict(equi_ratio=0, record_draws=True) if kind.startswith('Equi') else {}
    transform = build(dict(type=kind, transforms=views, num_views=[1, 1], **options))
    image = PHOTOS[0].copy().view(Counted)
    monkeypatch.setattr(Counted, 'copies', 0)
    transform(dict(img=image, img_path='x'))
    assert Counted.copies == expected and np.array_equal(image, PHOTOS[0])


def test_views_in_b2_copy_no_whole_image(monkeypatch):
    view = [crop(scale=64), jitter(brightness=0.4), FLIP]
    transform = build(dict(type='EquivariantViewPipeline', views=[view, view], equi_ratio=1))
    image = PHOTOS[0].copy().view(Counted)
    monkeypatch.setattr(Counted, 'copies', 0)
    *views, _ = transform(dict(img=image))['img']
    assert Counted.copies == 0 and [x.shape for x in views] == [(64, 64, 3)] * 2


def test_transforms_that_write_into_images_do_so_in_their_own():
    erase = dict(type='RandomErasing', erase_prob=1.0, mode='const', fill_color=(0, 0, 0))
    image = np.full((64, 64, 3), 200, np.uint8)
    views = [[crop(scale=64), erase], [crop(scale=64)], [erase], []]
    made = FastMultiView(views, [1, 1, 1, 1])(dict(img=image))['img']
    assert [bool((x == 0).any()) for x in made] == [True, False, True, False]
    assert (image == 200).all()


def test_memory_of_views_is_that_of_crops():
    """Of photometry on the device: no array as large as the image is made, packing included."""
    policy = [crop(scale=224, crop_ratio_range=(0.08, 0.2)), FLIP]
    views = FastMultiView([policy], [2])
    pack = build(dict(type='FastPackInputs'))
    image = np.zeros((1500, 2000, 3), np.uint8)
    pack(views(dict(img=image)))
    tracemalloc.start()
    pack(views(dict(img=image)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Of each view the packed one, of one the flipped one; torch's own are not counted.
    assert peak < 4 * 224 * 224 * 3 + 2**17 < image.nbytes / 8


@pytest.mark.parametrize('kind', ['crop', 'jitter', 'grey', 'blur', 'solarize'])
def test_other_images_are_refused_in_one_sentence(kind):
    configs = dict(
        crop=crop(),
        jitter=jitter(),
        grey=dict(type='FastRandomGrayscale', prob=1.0),
        blur=dict(type='FastGaussianBlur', radius=2.0, prob=1.0),
        solarize=dict(type='FastSolarize', thr=128, prob=1.0),
    )
    transform = build(configs[kind])
    for image in (PHOTOS[0].astype(float), PHOTOS[0][..., 0]):
        with pytest.raises(ValueError, match='must be uint8') as error:
            transform(dict(img=image))
        message = str(error.value)
        assert '\n' not in message and message.endswith(f'use {type(transform).__name__[4:]}.')


@pytest.mark.parametrize(
    'config, message',
    [
        (crop(backend='cv2'), "backend='cv2' must be 'pillow'"),
        (crop(interpolation='lanczos'), "interpolation='lanczos' must be 'bilinear' or 'bicubic'"),
        (crop(crop_ratio_range=(1.0, 0.08)), 'the smaller one first'),
        (dict(type='FastGaussianBlur', prob=0.5), 'radius=None and magnitude_range=None; give one'),
        (dict(type='FastRandomGrayscale', keep_channels=False), 'set keep_channels=True'),
        (dict(type='FastMultiView', transforms=[[FLIP]], num_views=[1, 2]), '2 numbers for 1'),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(config, message):
    with pytest.raises(ValueError, match=message) as error:
        build(config)
    assert '\n' not in str(error.value)


# Files


def write_kinds(folder):
    """One picture as files of many kinds, and one that ends too soon."""
    picture = Image.fromarray(PHOTOS[0][::4, ::4, ::-1])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture.save(folder / 'turned.jpg', exif=exif)
    picture.save(folder / 'plain.jpg')
    picture.save(folder / 'progressive.jpg', progressive=True)
    picture.convert('CMYK').save(folder / 'cmyk.jpg')
    picture.convert('L').save(folder / 'grey.jpg')
    picture.convert('P').save(folder / 'palette.png')
    picture.convert('RGBA').save(folder / 'alpha.png')
    picture.save(folder / 'picture.webp')
    deep = np.asarray(picture.convert('L')).astype(np.uint16) * 257
    cv2.imwrite(str(folder / 'deep.png'), deep)
    data = (folder / 'plain.jpg').read_bytes()
    (folder / 'truncated.jpg').write_bytes(data[: len(data) // 2])
    (folder / 'none.jpg').write_bytes(data[:20])
    return sorted(folder.iterdir())


def test_files_of_all_kinds_are_those_of_mmpretrain(tmp_path):
    view = [crop(scale=32), FLIP]
    pipeline = [
        dict(type='LoadReadableImage'),
        dict(type='FastMultiView', transforms=[view], num_views=2),
        dict(type='FastPackInputs'),
    ]
    theirs = [dict(type='LoadImageFromFile'), *of_mmpretrain(pipeline[1:])]
    theirs[1]['num_views'] = [2]
    ours, theirs = (build(dict(type='Compose', transforms=x)) for x in (pipeline, theirs))
    read = 0
    for path in write_kinds(tmp_path):
        seed(0)
        found = ours(dict(img_path=str(path)))
        seed(0)
        try:
            expected = theirs(dict(img_path=str(path)))
        except AssertionError:  # MMCV's, of what cannot be decoded
            assert found is None and path.stem in ('none', 'truncated')
            continue
        read += 1
        for x, y in zip(found['inputs'], expected['inputs'], strict=True):
            assert (x.int() - y.int()).abs().max() <= 2, path.name
        assert found['data_samples'].ori_shape == expected['data_samples'].ori_shape
    assert read >= 9
