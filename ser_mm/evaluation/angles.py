"""Accuracy against angle: probes trained on upright images, and validation images that turn."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor

from ser_mm.evaluation.knn import knn_probe
from ser_mm.evaluation.linear import choose_solver, fit_classifier
from ser_mm.evaluation.warping import Warp, disc, warp_images

Labelled = Iterable[tuple[Tensor, Tensor]]
"""Batches of images (N, 3, H, W) and labels (N,)."""


@torch.no_grad()
def embed_in_disc(
    embed: Callable[[Tensor], Tensor],
    batches: Labelled,
    warps: Mapping[str, Sequence[Warp]],
) -> tuple[dict[str, Tensor], Tensor]:
    """Vectors of images that are warped, and of which the disc that every turn keeps is shown.

    Args:
        embed (Callable): Maps images (N, 3, H, W) to vectors (N, C), in eval mode.
        batches (Iterable): Images, normalized, and labels. What is outside of the disc becomes 0,
            the mean colour.
        warps (Mapping[str, Sequence[Warp]]): By a name, warps that are applied one after another.

    Returns:
        tuple: Vectors (N, C) by name, and labels (N,), on the CPU.

    Raises:
        ValueError: If there is no image.
    """
    vectors: dict[str, list[Tensor]] = {name: [] for name in warps}
    labels = []
    for x, own in batches:
        inside = disc(x.shape[-2:]).to(x)
        for name, some in warps.items():
            moved = x
            for warp in some:
                moved = warp_images(moved, warp)
            vectors[name].append(embed(moved * inside).float().cpu())
        labels.append(own)
    if not labels:
        raise ValueError('embed_in_disc: batches has no image.')
    # One name at a time, without all parts beside all results.
    return {name: torch.cat(vectors.pop(name)) for name in warps}, torch.cat(labels)


def accuracy_by_angle(
    embed: Callable[[Tensor], Tensor],
    train: Labelled,
    val: Labelled,
    angles: Sequence[float],
    k: int = 20,
    solver: str | None = None,
) -> dict[str, dict[str, float]]:
    """Top-1 accuracy of probes of upright images on images turned by each angle.

    All images, those for training and those at 0 degrees too, show the disc that every turn keeps
    and the mean colour around it, so neither corners nor borders tell the angle. The same bicubic
    sampling turns them by all angles.

    Args:
        embed (Callable): Maps images (N, 3, H, W) to vectors (N, C), in eval mode.
        train (Iterable): Batches of upright images, normalized, and labels.
        val (Iterable): Batches of images that are turned, and labels.
        angles (Sequence[float]): Degrees, counter-clockwise.
        k (int): Neighbours, see :func:`~ser_mm.evaluation.knn_probe`. Defaults to 20.
        solver (str, optional): Of the linear probe, see
            :func:`~ser_mm.evaluation.linear.fit_classifier`. Defaults to None: what
            :func:`~ser_mm.evaluation.linear.choose_solver` says.

    Returns:
        dict[str, dict[str, float]]: By the name of an angle ('15'):

        - ``knn`` and ``probe``: accuracies in [0, 1].
        - ``knn_back`` and ``probe_back``: those on images that are turned by the angle and back.
          They are upright, and sampled twice: what these lose, sampling costs and not the turn.
        - ``chance``: what answering with the most frequent label of the training images gives;
          the mean of these, where several are.

    Raises:
        ValueError: If there is no image, or all training images are of one class.
    """
    warps = {}
    for angle in angles:
        warps[f'{angle:g}'] = [Warp(angle)]
        warps[f'{angle:g} back'] = [Warp(angle), Warp(-angle)]
    known, known_labels = embed_in_disc(embed, train, {'upright': []})
    upright = known['upright']
    if len(known_labels.unique()) < 2:
        raise ValueError(
            f'train: all {len(known_labels)} training images are of one class; take more of them '
            '(train_images), or data of several classes.'
        )
    vectors, labels = embed_in_disc(embed, val, warps)
    solver = solver or choose_solver(len(upright))
    classify = fit_classifier(upright, known_labels, solver=solver)
    classes = int(torch.cat([labels, known_labels]).max()) + 1
    known_counts = known_labels.bincount(minlength=classes)
    share = labels.bincount(minlength=classes).double() / len(labels)
    chance = float(share[known_counts == known_counts.max()].mean())
    unseen = float(share[known_counts == 0].sum())
    if unseen:
        print_log(
            f'{unseen:.0%} of the validation images are of classes that no training image is of, '
            'and cannot be right; take more training images.',
            'current',
            logging.WARNING,
        )
    found: dict[str, dict[str, float]] = {}
    for angle in angles:
        entry = found[f'{angle:g}'] = {}
        for end in ('', '_back'):
            turned = vectors[f'{angle:g}{end.replace("_", " ")}']
            entry[f'knn{end}'] = knn_probe(upright, known_labels, turned, labels, k)
            entry[f'probe{end}'] = float((classify(turned) == labels).double().mean())
        entry['chance'] = chance
    return found
