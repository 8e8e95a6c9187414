"""Sets of images of the training classes, of some of them, and folders as published."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from ser_mm.evaluation.sets import add_sets, match_classes, measure_set
from tests.support.images import write_images
from tests.support.probed import config

WNIDS = [f'n{i:08d}' for i in random.Random(0).sample(range(10**8), 1000)]


def linear(weight):
    head = nn.Linear(*weight.shape[::-1])
    head.load_state_dict(dict(weight=weight, bias=torch.zeros(len(weight))))
    return head


def test_numbers_of_imagenet_v2_are_not_in_the_order_of_their_names():
    classes, folders = sorted(WNIDS), sorted(str(i) for i in range(1000))
    assert folders[:4] == ['0', '1', '10', '100']
    found = match_classes(folders, classes)
    assert found[:4] == [0, 1, 10, 100] and sorted(found) == list(range(1000))
    # Where they are what the training images' classes are called, they are names.
    assert match_classes(['0', '10', '2'], sorted(map(str, range(11)))) == [0, 2, 3]


def test_names_of_some_classes():
    classes = sorted(WNIDS)
    some = sorted(WNIDS[:200])
    assert [classes[i] for i in match_classes(some, classes)] == some


@pytest.mark.parametrize(
    ('names', 'count', 'told'),
    [
        (map(str, range(1000)), 100, '1000 folders are numbers from 0 to 999, and .* 100 classes'),
        (map(str, range(1, 101)), 100, 'from 1 to 100, and evaluation.train has 100 classes'),
        (map(str, range(99)), 100, '99 folders'),
        (['n1', 'n2', *sorted(WNIDS)[:2]], 100, 'n1 and 1 more of its 4 folders are none of the'),
        (['imagenet-r'], 1000, 'name the folder that holds the class folders'),
        (['0', 'n1'], 100, '0 and 1 more'),
    ],
)
def test_folders_that_are_no_classes(names, count, told):
    with pytest.raises(ValueError, match=told):
        match_classes(list(names), sorted(WNIDS)[:count])


def test_some_classes_by_scikit_learn_and_numpy(features):
    """Classes 4, 1 and 2 of six: logits of these, and neighbours among their images."""
    x, v, y, w = features
    numbers = [4, 1, 2]
    chosen = torch.isin(w, torch.tensor(numbers))
    labels = torch.tensor([numbers.index(i) for i in w[chosen].tolist()])
    head = linear(torch.randn(6, 4))
    found = measure_set(head, (x, y), (v[chosen], labels), numbers, [1, 25], temperature=0.1)

    logits = v[chosen].numpy() @ head.weight.detach().numpy()[numbers].T
    expected = float((logits.argmax(1) == labels.numpy()).mean())
    assert found['linear probe']['top1'] == expected and 0.1 < expected < 0.9
    known = np.isin(y, numbers)
    for k in (1, 25):
        vote = KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp(-d / 0.1))
        vote.fit(F.normalize(x, dim=1).numpy()[known], y.numpy()[known])
        answers = vote.predict(F.normalize(v[chosen], dim=1).numpy())
        expected = float((answers == w[chosen].numpy()).mean())
        # Rounding in float32 may decide on a vote or two.
        assert found[f'{k}-NN']['top1'] == pytest.approx(expected, abs=2.5 / len(labels))
    assert found['linear probe']['images'] == len(labels)


def test_floor_and_ceiling():
    """What is nearest to another class is still right if that class is not of the set."""
    train = torch.eye(10).repeat(3, 1), torch.arange(10).repeat(3)
    numbers, labels = [7, 0, 3], torch.arange(3).repeat(5)
    true = F.one_hot(torch.tensor(numbers)[labels], 10).float()
    head, ks = linear(torch.eye(10)), [1, 3]
    for features in (true, true + 2 * F.one_hot(torch.tensor(5), 10)):
        found = measure_set(head, train, (features, labels), numbers, ks)
        assert {name: result['top1'] for name, result in found.items()} == {
            'linear probe': 1,
            '1-NN': 1,
            '3-NN': 1,
        }
    everything = torch.tensor(numbers)[labels]
    found = measure_set(head, train, (features, everything), range(10), ks)
    assert {result['top1'] for result in found.values()} == {0}
    found = measure_set(head, train, (true.roll(1, 0), labels), numbers, ks)
    assert {result['top1'] for result in found.values()} == {0}


def test_what_cannot_be_a_set(imagenet_tree, tmp_path):
    def refused(cfg=None, **folders):
        cfg = cfg or config(imagenet_tree)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            add_sets(cfg, folders)
        assert '\n' not in str(error.value)
        return str(error.value)

    tree = imagenet_tree / 'train'
    assert 'choose another name' in refused(val=tree)
    assert 'choose another name' in refused(prefix=tree)  # of weights, which is not in this config
    write_images(tmp_path, 'one/n00000001/a.png')
    assert 'has one class, n00000001' in refused(one=tmp_path / 'one')
    # As of CIFAR and STL-10, whose data sets hold pixels
    pixels = config(imagenet_tree)
    del pixels.evaluation.val.pipeline[0]
    assert 'begins with LoadImageFromFile' in refused(pixels, r=tree)
    assert 'does not exist' in refused(r=tmp_path / 'none')
    write_images(tmp_path, 'loose/a.png', 'r/n00000001/a.png', 'r/n00000009/a.png')
    assert 'Make a folder for each class' in refused(r=tmp_path / 'loose')
    assert 'n00000009 and 0 more of its 2 folders' in refused(r=tmp_path / 'r')
    (tmp_path / 'list.txt').write_text(f'{tmp_path}/loose/a.png 0')
    assert 'give a folder' in refused(r=tmp_path / 'list.txt')
    # The first two images only, of class 0
    some = config(imagenet_tree, indices=2)
    assert 'no image of class 1 and 2 more' in refused(some, r=tree)
    listed = config(imagenet_tree, ann_file=str(tmp_path / 'meta.txt'))
    lines = [f'{p.relative_to(tree)} {int(p.parent.name[1:])}' for p in tree.glob('*/*')]
    (tmp_path / 'meta.txt').write_text('\n'.join(lines))
    assert 'does not say what its classes are called' in refused(listed, r=tree)


def test_hidden_and_empty_folders_are_no_classes(imagenet_tree, tmp_path):
    write_images(tmp_path, '3/a.png', '0/a.png', '2/b.png', '1/b.png', '.trash/a.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'README.txt').write_text('as published')
    cfg = config(imagenet_tree)
    assert add_sets(cfg, dict(v2=tmp_path)) == dict(v2=[0, 1, 2, 3])
    assert cfg.evaluation.v2.pipeline == cfg.evaluation.val.pipeline
