"""Other sets of labelled images, under what was fitted on the training images of a run.

As published are read, by the names of their class folders:

- ImageNet-V2 (Recht et al., arXiv 1902.10811): the numbers 0 to 999 of the classes, not padded.
- ImageNet-R (Hendrycks et al., arXiv 2006.16241) and ImageNet-A (arXiv 1907.07174): wordnet ids of
  200 classes; only these are told apart, as the authors do.
- ImageNet-Sketch (Wang et al., arXiv 1905.13549): wordnet ids of all classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, nn

from ser_mm.datasets.image_source import check_images, class_folders
from ser_mm.evaluation.data import begins_by_loading, build_loader
from ser_mm.evaluation.knn import knn_votes
from ser_mm.evaluation.metrics import accuracy


def add_sets(cfg: Config, folders: Mapping[str, str | Path]) -> dict[str, list[int]]:
    """Add sets of images to ``cfg.evaluation``, checked before the long work.

    Args:
        cfg (Config): With the training images as ``evaluation.train``, and as ``evaluation.val``
            those whose transforms are applied to the sets.
        folders (Mapping[str, str | Path]): By name, folders of class folders.

    Returns:
        dict[str, list[int]]: For each set the classes of the training images that its folders are,
        see :func:`match_classes`, in the order of its labels, which is that of the names of its
        folders. Ranks other than the first return none.

    Raises:
        FileNotFoundError: If a folder has no images.
        ValueError: If a name is that of another field of ``evaluation``, if the transforms of
            ``evaluation.val`` read no files, or if the folders are not two or more classes of the
            training images.
    """
    found = {}
    pipeline = cfg.evaluation.val.get('pipeline') or [] if folders else []
    if folders and not begins_by_loading(pipeline):
        raise ValueError(
            f'{next(iter(folders))}: other sets are files, and evaluation.val, '
            f'{cfg.evaluation.val.type}, has no transforms that begin with reading one; set '
            'evaluation.val to a data set whose pipeline begins with LoadImageFromFile.'
        )
    for name, folder in folders.items():
        if not name or name == 'prefix' or name in cfg.evaluation:
            used = f'evaluation.{name} is something else' if name else 'the set has no name'
            raise ValueError(f'{name}={folder}: {used}; choose another name.')
        place = Path(folder).expanduser()
        if is_main_process():
            check_images(place, 'all', with_label=True)
            if not place.is_dir():
                raise ValueError(f'{name}={folder}: give a folder, with a folder for each class.')
            found[name] = sorted(class_folders(place))
        cfg.evaluation[name] = dict(
            type='mmpretrain.ImageSource',
            data_root=str(place),
            split='all',
            with_label=True,
            pipeline=pipeline,
        )
    if not folders:
        return {}
    # On all ranks, as some data sets wait for each other.
    dataset = build_loader(cfg, 'train')[1].dataset
    classes = getattr(dataset, 'folder_to_idx', None) or dataset.metainfo.get('classes')
    if not classes:
        raise ValueError(
            f'evaluation.train does not say what its classes are called, which {", ".join(found)} '
            'needs; use training images in class folders.'
        )
    there = set(map(int, dataset.get_gt_labels()))
    numbers = {}
    for name, folder in folders.items() if found else ():
        try:
            numbers[name] = match_classes(found[name], list(classes))
        except ValueError as error:
            raise ValueError(f'{name}={folder}: {error}') from error
        if len(found[name]) == 1:
            raise ValueError(
                f'{name}={folder}: has one class, {found[name][0]}, and only the classes of a set '
                'are told apart, so any answer would be right; give two or more.'
            )
        missing = [i for i in numbers[name] if i not in there]
        if missing:
            raise ValueError(
                f'{name}={folder}: evaluation.train has no image of class {missing[0]} and '
                f'{len(missing) - 1} more of its classes; take training images of all.'
            )
    return numbers


def match_classes(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Find the classes that folders are meant to be.

    Args:
        names (Sequence[str]): Names of the folders. They are names of classes, or else all numbers
            from 0 to K - 1, which count the classes, as in ImageNet-V2. (Sorted as text they are 0,
            1, 10, 100, 101, ...: their order is not that of the classes.)
        classes (Sequence[str]): Names of the K classes, in their order.

    Returns:
        list[int]: The class of each folder.

    Raises:
        ValueError: If a folder is no class.
    """
    places = {name: i for i, name in enumerate(classes)}
    odd = [name for name in names if name not in places]
    if not odd:
        return [places[name] for name in names]
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = [int(name) for name in names]
        if sorted(numbers) != list(range(len(classes))):
            raise ValueError(
                f'its {len(names)} folders are numbers from {min(numbers)} to {max(numbers)}, and '
                f'evaluation.train has {len(classes)} classes; numbers have to count all of them, '
                'so use training images of the same classes, or folders with their names.'
            )
        return numbers
    raise ValueError(
        f'{odd[0]} and {len(odd) - 1} more of its {len(names)} folders are none of the '
        f'{len(classes)} classes of evaluation.train ({classes[0]}, ...); name the folder that '
        'holds the class folders, and use training images of all these classes.'
    )


def measure_set(
    head: nn.Linear,
    train: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor],
    numbers: Sequence[int],
    ks: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
) -> dict[str, dict]:
    """Accuracy on images of some of the classes that a head and neighbours know.

    Only the classes of the set are told apart: the head answers with the one of them that has the
    largest logit, and neighbours are sought among the training images of these.

    Args:
        head (nn.Linear): Fitted on the training features, of all classes.
        train (tuple[Tensor, Tensor]): Training features, (N, C), and labels, (N,).
        images (tuple[Tensor, Tensor]): Features of the set, (M, C), and its labels, (M,), which are
            places in ``numbers``.
        numbers (Sequence[int]): The classes of the set, each with a training image.
        ks (Sequence[int]): Numbers of neighbours. Defaults to (10, 20, 100).
        temperature (float): See :func:`~ser_mm.evaluation.knn_votes`. Defaults to 0.07.

    Returns:
        dict[str, dict]: Of 'linear probe' and '10-NN', ..., see
        :func:`~ser_mm.evaluation.accuracy`.
    """
    (known, classes), (features, labels) = train, images
    scores = {'linear probe': head(features).detach()[:, numbers]}
    places = torch.full((int(classes.max()) + 1,), -1)
    places[list(numbers)] = torch.arange(len(numbers))
    own = places[classes]
    if (own < 0).any():
        known, own = known[own >= 0], own[own >= 0]
    votes = knn_votes(known, own, features, ks, temperature)
    scores |= {f'{k}-NN': votes[k] for k in ks}
    return {name: accuracy(some, labels) for name, some in scores.items()}
