"""Accuracy of images that turn: by hand, and of representations whose curve is known."""

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from ser_mm.evaluation.angles import accuracy_by_angle, embed_in_disc
from ser_mm.evaluation.warping import Warp, disc

SIDE = 32


def bars(count=24, seed=0):
    """Images of a bright half on the left, right, top or bottom, in noise, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, SIDE, SIDE, generator=rng, dtype=torch.float64) / 10
    images[labels == 0, :, :, : SIDE // 2] += 1
    images[labels == 1, :, :, SIDE // 2 :] += 1
    images[labels == 2, :, : SIDE // 2] += 1
    images[labels == 3, :, SIDE // 2 :] += 1
    return images, labels


def thumbnails(images):
    return F.avg_pool2d(images, 8).flatten(1)


def test_turned_classes_are_mistaken_for_each_other():
    """Thumbnails tell the halves: all right at 0, all wrong at the quarter turns."""
    images, labels = bars()
    found = accuracy_by_angle(thumbnails, [bars(seed=1)], [(images, labels)], [0, 90, 180, 315])
    for key in ('knn', 'probe'):
        assert [found[a][key] for a in ('0', '90', '180')] == [1, 0, 0]
        assert all(entry[f'{key}_back'] == 1 for entry in found.values())
        assert found['0']['chance'] == 0.25


def test_what_no_turn_changes_is_at_the_ceiling_and_a_constant_at_the_floor():
    """Two classes by brightness, and the mean colour of the disc."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    images = torch.randn(20, 3, SIDE, SIDE, generator=rng) + 3 * labels.view(-1, 1, 1, 1)
    data = [(images, labels)]
    found = accuracy_by_angle(lambda x: x.mean(dim=(2, 3)), data, data, [0, 20, 45, 90], k=1)
    assert {entry['knn'] for entry in found.values()} == {1}
    assert {entry['probe'] for entry in found.values()} == {1}
    uneven = torch.tensor([0] * 15 + [1] * 5)
    data = [(images, uneven)]
    found = accuracy_by_angle(lambda x: torch.ones(len(x), 4), data, data, [45])['45']
    assert found['knn'] == found['probe'] == found['chance'] == 0.75


def test_accuracies_are_those_of_another_library():
    images, labels = bars(40)
    train, known = bars(40, seed=1)
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(2)) * 20
    found = accuracy_by_angle(thumbnails, [(train, known)], [(noisy, labels)], [90], k=1)['90']
    inside = disc((SIDE, SIDE))
    turned = thumbnails(torch.rot90(noisy, 1, (2, 3)) * inside).float()
    theirs = KNeighborsClassifier(1, metric='cosine').fit(thumbnails(train * inside), known)
    assert found['knn'] == pytest.approx(theirs.score(turned, labels), abs=1e-12)
    assert 0 < found['knn'] < 1


def test_angle_cannot_be_told_from_what_is_outside():
    """The border shows the mean colour at all angles, and batches do not matter."""
    photo = torch.from_numpy(skimage.data.chelsea()[:48, :48] / 255).permute(2, 0, 1)
    images = torch.stack([photo, photo.flip(2)])
    labels = torch.tensor([0, 1])
    outside = disc((48, 48)) == 0

    def border(x):
        return x[..., outside].flatten(1)

    warps = {'upright': [], '0': [Warp(0)], '45': [Warp(45)], '90 back': [Warp(90), Warp(-90)]}
    vectors, _ = embed_in_disc(border, [(images, labels)], warps)
    assert all(not v.any() for v in vectors.values())
    whole, _ = embed_in_disc(torch.flatten, [(images[:1], labels[:1])], warps)
    torch.testing.assert_close(whole['90 back'], whole['upright'], atol=1e-6, rtol=0)
    pairs = [(images[:1], labels[:1]), (images[1:], labels[1:])]
    one, own = embed_in_disc(thumbnails, pairs, warps)
    both, labels = embed_in_disc(thumbnails, [(images, labels)], warps)
    assert torch.equal(own, labels)
    for name, vectors in both.items():
        torch.testing.assert_close(one[name], vectors)
    with pytest.raises(ValueError, match='batches has no image'):
        embed_in_disc(thumbnails, [], warps)


def test_training_images_that_cannot_teach(monkeypatch):
    """One class is refused before the validation images; classes that lack are told."""
    images, flat = torch.rand(4, 3, 16, 16), nn.Flatten()
    with pytest.raises(ValueError, match='all 4 training images are of one class; take more'):
        accuracy_by_angle(flat, [(images, torch.full((4,), 3))], iter(()), [0])
    told = []
    monkeypatch.setattr(
        'ser_mm.evaluation.angles.print_log', lambda text, *_: told.append(text.split(' of ')[0])
    )
    train, val = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2])
    found = accuracy_by_angle(flat, [(images, train)], [(images, val)], [0], k=1)
    assert found['0']['chance'] == 0.25  # 0 or 1
    assert told == ['50%']


def test_images_without_a_disc():
    with pytest.raises(ValueError, match='images of 4 x 9 pixels hold no disc'):
        disc((4, 9))
