"""Detection on the real boxes of Tiny ImageNet: a detector on a frozen backbone, and its mAP."""

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ser_mm.datasets import write_tiny_imagenet_boxes
from ser_mm.engine.configs import find_config
from ser_mm.engine.operators import require_operators
from ser_mm.experiments.detectors import (
    frozen_backbone,
    train_and_score,
    without_validation,
    write_random,
)
from ser_mm.experiments.runs import check_settings
from ser_mm.files import digest_file

METRICS = ('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75')


def box_map(
    checkpoint: str | Path | None,
    seed: int,
    work_dir: str | Path,
    data_root: str | Path = 'data/tiny-imagenet-200',
    backbone: Mapping[str, Any] | None = None,
    size: int = 64,
    images: tuple[int, int] = (15, 5),
    cfg_options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train a Faster R-CNN on a frozen backbone, and score its boxes by pycocotools.

    The detector is that of ``configs/tiny_imagenet/faster-rcnn_tiny.py``. It is
    class-agnostic: it has to find objects, not to name them. For one seed, the initial weights
    beside the backbone's, the images of each step and which of them are mirrored do not depend on
    the backbone.

    What was trained is not trained again, and an interrupted run goes on when it is called again.

    Args:
        checkpoint (str | Path | None): Of a pretraining; its backbone's weights are used. None:
            the random weights that ``seed`` gives, which are kept beside the run.
        seed (int): Seed of the run.
        work_dir (str | Path): Its folder. Config, log and result are beside it, with the suffixes
            ``.py``, ``.log`` and ``.json``.
        data_root (str | Path): Folder of Tiny ImageNet. Defaults to 'data/tiny-imagenet-200'.
        backbone (Mapping[str, Any], optional): ``model.backbone`` of the config that was
            pretrained by, a ViT whose ``arch`` is a dict. Defaults to None: that of the detector's
            config, which has [CLS] after block 2.
        size (int): Side that images are scaled to, in pixels. Defaults to 64, as they are.
        images (tuple[int, int]): Images of each class to train on and to score on, see
            :func:`~ser_mm.datasets.write_tiny_imagenet_boxes`. Defaults to (15, 5).
        cfg_options (Mapping[str, Any], optional): Fields of the config to override. Defaults to
            None.

    Returns:
        dict[str, float]: ``bbox_mAP`` (mean over IoU 0.5 to 0.95), ``bbox_mAP_50`` and
        ``bbox_mAP_75``, from 0 to 1, to three places.

    Raises:
        BlockingIOError: If another process trains this run.
        FileExistsError, ValueError: If the folder holds a run with other settings or images.
        FileNotFoundError: If the data set or the checkpoint is missing.
        ImportError: If MMDetection cannot run.
        RunError: If the run fails.
    """
    require_operators('Detection')
    work_dir = Path(work_dir).expanduser().absolute()
    cfg = boxes_config(seed, work_dir, data_root, backbone, size, cfg_options)
    start = cfg.model.backbone.init_cfg
    random = f'{work_dir}_random.pth'  # which the seed gives
    if checkpoint is None:
        start.checkpoint = random
    elif Path(checkpoint).expanduser().is_file():
        start.checkpoint = str(Path(checkpoint).expanduser().absolute())
        if start.checkpoint != random:
            cfg.inputs = dict(checkpoint=digest_file(start.checkpoint))
    else:
        raise FileNotFoundError(
            f'box_map: checkpoint={str(checkpoint)!r} is not a file; name a checkpoint of a '
            'pretraining, or None for random weights.'
        )
    check_settings(cfg)
    write_tiny_imagenet_boxes(data_root, work_dir / 'data', *images)
    if checkpoint is None:
        write_random(cfg.model.backbone, seed, Path(start.checkpoint))
    return train_and_score({work_dir.name: cfg}, METRICS)[work_dir.name]


def whole_image_map(annotations: str | Path) -> dict[str, float]:
    """What a detector gets that has not looked: the whole of each image as its only box.

    Most objects of Tiny ImageNet fill much of their image, so this floor is far above 0.

    Args:
        annotations (str | Path): Class-agnostic ``val.json``, see
            :func:`~ser_mm.datasets.write_tiny_imagenet_boxes`.

    Returns:
        dict[str, float]: As :func:`box_map`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
        found = [
            dict(image_id=id, category_id=1, bbox=[0, 0, x['width'], x['height']], score=1.0)
            for id, x in truth.imgs.items()
        ]
        scored = COCOeval(truth, truth.loadRes(found), 'bbox')
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return dict(zip(METRICS, scored.stats[:3].round(3).tolist(), strict=True))


def boxes_config(
    seed: int,
    work_dir: Path,
    data_root: str | Path,
    backbone: Mapping[str, Any] | None,
    size: int,
    cfg_options: Mapping[str, Any] | None,
) -> Config:
    """Config of a run of :func:`box_map`, but for the checkpoint; it is scored when it has ended.

    Args:
        seed (int): See :func:`box_map`.
        work_dir (Path): See :func:`box_map`; absolute.
        data_root (str | Path): See :func:`box_map`.
        backbone (Mapping[str, Any], optional): See :func:`box_map`.
        size (int): See :func:`box_map`.
        cfg_options (Mapping[str, Any], optional): See :func:`box_map`.
    """
    cfg = Config.fromfile(find_config('tiny_imagenet/faster-rcnn_tiny'))
    if backbone is not None:
        init_cfg = cfg.model.backbone.init_cfg
        cfg.model.backbone = dict(frozen_backbone(backbone), init_cfg=init_cfg)
        cfg.model.neck.in_channels = backbone['arch']['embed_dims']
    for split, name, resize in (('train', 'train', 3), ('val', 'val', 2), ('test', 'val', 2)):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_prefix.img = str(Path(data_root).expanduser().absolute())
        dataset.ann_file = f'{work_dir}/data/{name}.json'
        dataset.pipeline[resize].scale = (size, size)
    cfg.test_evaluator.ann_file = cfg.test_dataloader.dataset.ann_file
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(dict(cfg_options or {}))
    return without_validation(cfg)
