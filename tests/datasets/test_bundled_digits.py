import pytest
from pycocotools.coco import COCO

from ser_mm.datasets import write_bundled_digits


def test_written_annotations_fit_their_masks(tmp_path):
    root = tmp_path / 'digits'
    write_bundled_digits(root, num_train=12, num_val=6, size=128)
    for split, count in dict(train=12, val=6).items():
        coco = COCO(root / f'{split}.json')
        assert len(coco.imgs) == count
        assert 0 not in coco.anns  # pycocotools counts it as missed
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            ys, xs = mask.nonzero()
            x, y, width, height = annotation['bbox']
            assert (x, y) == (xs.min(), ys.min())
            assert (x + width, y + height) == (xs.max() + 1, ys.max() + 1)
            assert annotation['area'] == mask.sum() > 0
    before = (root / 'train.json').stat().st_mtime_ns
    write_bundled_digits(root, num_train=12, num_val=6, size=128)
    assert (root / 'train.json').stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match='choose another folder'):
        write_bundled_digits(root, num_train=13, num_val=6, size=128)
