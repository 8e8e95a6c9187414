"""t-SNE of features of some classes, and numbers for what the eye sees."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from mmpretrain.registry import DATASETS

from ser_mm.engine.checks import check_dataset
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.robustness import corrupted

NEIGHBOURS = 10
MEASURES = ('silhouette', 'agreement')

Panel = tuple[np.ndarray, np.ndarray]
"""Features (N, C), of length 1, and labels (N,), which count the chosen classes."""


def choose_images(
    dataset: dict, classes: Sequence[str] | None = None, per_class: int = 50
) -> tuple[dict, list[str]]:
    """The first images of some classes of a data set.

    Args:
        dataset (dict): Config.
        classes (Sequence[str], optional): Their names. Defaults to None: 20, evenly spaced.
        per_class (int): Images of each, at most. Defaults to 50.

    Returns:
        tuple: Config of the subset, and the names in the order of the data set.

    Raises:
        ValueError: If a class has no image in the data set, or there are fewer than two.
    """
    whole = DATASETS.build(dataset)
    known = list(whole.metainfo.get('classes') or [])
    labels = np.array([whole.get_data_info(i)['gt_label'] for i in range(len(whole))])
    seen = [name for i, name in enumerate(known) if (labels == i).any()]
    if classes is None:
        count = min(20, len(seen))
        classes = [seen[i * len(seen) // count] for i in range(count)]
    odd = [name for name in classes if name not in seen]
    if odd or len(set(classes)) < 2:
        raise ValueError(
            f'classes {" ".join(odd or classes)}: choose two or more that have images, of '
            f'{", ".join(seen[:20])}{", ..." if len(seen) > 20 else ""}.'
        )
    classes = [name for name in known if name in classes]
    chosen = [np.flatnonzero(labels == known.index(name))[:per_class] for name in classes]
    indices = np.concatenate(chosen)
    given = dataset.get('indices')
    if given is not None:
        indices = np.arange(given)[indices] if isinstance(given, int) else np.array(given)[indices]
    return dict(dataset, indices=indices.tolist()), classes


def load_panels(
    source: CachedFeatures,
    corruption: str,
    severity: int,
    root: Path | None = None,
    classes: Sequence[str] | None = None,
    per_class: int = 50,
    perplexity: float = 30,
) -> tuple[dict[str, Panel], list[str]]:
    """Features of validation images of some classes, clean and corrupted.

    Args:
        source (CachedFeatures): Features of a run. The subsets of its data are added to
            ``evaluation`` of its config.
        corruption (str): See :func:`~ser_mm.evaluation.robustness.corrupted`.
        severity (int): 1 to 5.
        root (Path, optional): Folder of ImageNet-C. Defaults to None: corrupted on the fly.
        classes (Sequence[str], optional): Names of the classes. Defaults to None: 20, evenly
            spaced.
        per_class (int): Images of each, at most. Defaults to 50.
        perplexity (float): Of the t-SNE that will follow. Defaults to 30.

    Returns:
        tuple: Features and labels by name, 'clean' and 'corruption/severity', and the names of
        the classes in the order of the data set.

    Raises:
        FileNotFoundError: If a folder has no images.
        ValueError: If a class is not in the data, or there are too few images for the perplexity.
    """
    clean = source.cfg.evaluation.val
    datasets = {
        'clean': clean,
        f'{corruption}/{severity}': corrupted(clean, corruption, severity, root),
    }
    for name, dataset in datasets.items():
        check_dataset(name, dataset, 'mmpretrain')
        source.cfg.evaluation[name], classes = choose_images(dataset, classes, per_class)
        count = len(source.cfg.evaluation[name].indices)
        if count <= max(perplexity, NEIGHBOURS):
            lower = 'lower it or ' if perplexity >= NEIGHBOURS else ''
            raise ValueError(
                f'perplexity {perplexity:g} needs more than {count} images, as do the {NEIGHBOURS} '
                f'neighbours that are looked at; {lower}take more of each class.'
            )
    panels = {}
    for name in datasets:
        features, labels = source.load(name)
        # Labels count the classes of the data set; from here on, those that are shown.
        panels[name] = F.normalize(features).numpy(), np.unique(labels, return_inverse=True)[1]
    return panels, list(classes or ())


def embed(features: np.ndarray, perplexity: float = 30, seed: int = 0) -> np.ndarray:
    """Places (N, 2) of features (N, C) on the map of t-SNE, which starts from their PCA.

    Args:
        features (np.ndarray): Shape (N, C), N greater than the perplexity.
        perplexity (float): Defaults to 30.
        seed (int): Defaults to 0.
    """
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=perplexity, init='pca', random_state=seed)
    return tsne.fit_transform(features)


def measure_classes(places: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well classes are apart.

    Args:
        places (np.ndarray): Shape (N, C), N > 10.
        labels (np.ndarray): Shape (N,).

    Returns:
        dict[str, float]: ``silhouette``, in [-1, 1], and ``agreement``, the share of a point's 10
        nearest neighbours that are of its class, in [0, 1].
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(places).kneighbors(return_distance=False)
    return dict(
        silhouette=float(silhouette_score(places, labels)),
        agreement=float((labels[near] == labels[:, None]).mean()),
    )
