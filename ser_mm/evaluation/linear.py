"""Linear probes: one solved to convergence, and a sweep of learning rates by SGD."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_main_process
from torch import Tensor, nn

from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.metrics import accuracy
from ser_mm.files import read_kept, replacing
from ser_mm.progress import tell_progress

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SOLVERS = ('lbfgs', 'sgd')
SOLVABLE = 20000
"""Training images up to which the regression is solved to convergence, in seconds."""


def choose_solver(num_images: int) -> str:
    """How :func:`linear_probe` is solved where nothing else is asked for.

    Args:
        num_images (int): Training images.

    Returns:
        str: 'lbfgs' up to :data:`SOLVABLE` of them, else 'sgd'.
    """
    return 'lbfgs' if num_images <= SOLVABLE else 'sgd'


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    regularization: float = 1.0,
    max_iter: int = 1000,
    solver: str = 'lbfgs',
    cache_dir: str | Path | None = None,
) -> float:
    """Accuracy of a linear classifier on frozen features.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        val_labels (Tensor): Shape (M,).
        regularization (float): See :func:`fit_classifier`. Defaults to 1.0.
        max_iter (int): See :func:`fit_classifier`. Defaults to 1000.
        solver (str): See :func:`fit_classifier`. Defaults to 'lbfgs'.
        cache_dir (str | Path, optional): See :func:`fit_classifier`. Defaults to None.

    Returns:
        float: Share of the validation features classified rightly, in [0, 1].

    Raises:
        ValueError: If the solver is unknown.
    """
    classify = fit_classifier(train, train_labels, regularization, max_iter, solver, cache_dir)
    return float((classify(val) == val_labels).double().mean())


def fit_classifier(
    train: Tensor,
    train_labels: Tensor,
    regularization: float = 1.0,
    max_iter: int = 1000,
    solver: str = 'lbfgs',
    cache_dir: str | Path | None = None,
) -> Callable[[Tensor], Tensor]:
    """A linear classifier of frozen features.

    - 'lbfgs': logistic regression, solved to convergence on features that are standardized by the
      mean and deviation of the training set, so nothing but its regularization is to be tuned.
    - 'sgd': the best of a sweep of learning rates, see :func:`select_linear_head`, for training
      sets of any size.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        regularization (float): Of 'lbfgs', weight of the squared norm relative to the summed loss,
            the inverse of scikit-learn's ``C``. Defaults to 1.0.
        max_iter (int): Of 'lbfgs', limit of the iterations. Defaults to 1000.
        solver (str): One of these. Defaults to 'lbfgs'; :func:`choose_solver` has the rule that
            ``ser-mm ablate`` follows.
        cache_dir (str | Path, optional): Of 'sgd', folder that keeps the head. Defaults to None:
            it is not kept.

    Returns:
        Callable[[Tensor], Tensor]: Classes (M,) of features (M, C).

    Raises:
        ValueError: If the solver is unknown.
    """
    if solver not in SOLVERS:
        raise ValueError(f'solver={solver!r}: choose one of {", ".join(SOLVERS)}.')
    if solver == 'sgd':
        head, _ = select_linear_head(train, train_labels, cache_dir)
        return lambda features: head(features).detach().argmax(dim=1)

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    regression = LogisticRegression(C=1 / regularization, max_iter=max_iter)
    # The solver's steps are so short that threads spend their time waiting for each other.
    with threadpool_limits(1):
        probe = make_pipeline(StandardScaler(), regression).fit(train.numpy(), train_labels.numpy())
    return lambda features: torch.from_numpy(probe.predict(features.numpy()))


def fit_linear_heads(
    features: Tensor,
    labels: Tensor,
    learning_rates: Sequence[float],
    num_classes: int | None = None,
    epochs: int = 50,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Linear classifiers on frozen features, one per learning rate, in one pass over the features.

    The protocol of MoCo v3 and DINO: SGD with momentum 0.9, no weight decay, learning rates in
    units of batch_size / 256 that fall to 0 by a cosine, step by step. All heads see the same
    batches and start at 0; none depends on the others.

    Args:
        features (Tensor): Shape (N, C).
        labels (Tensor): Shape (N,).
        learning_rates (Sequence[float]): L of them.
        num_classes (int, optional): K. Defaults to None: the largest label + 1.
        epochs (int): Defaults to 50.
        batch_size (int): At most N are used. Defaults to 256.
        seed (int): Seed of the order of the features. Defaults to 0.

    Returns:
        tuple: Weights (L, C, K) and biases (L, K), on the device.
    """
    device, count = get_device(), len(features)
    batch_size = min(batch_size, count)
    features, labels = features.to(device), labels.to(device)
    num_classes = num_classes or int(labels.max()) + 1
    rates = torch.tensor(learning_rates, device=device) * batch_size / 256
    shape = len(rates), features.shape[1], num_classes
    weight = torch.zeros(shape, device=device, requires_grad=True)
    bias = torch.zeros(shape[0], 1, num_classes, device=device, requires_grad=True)
    # A head's own rate scales its loss, and with that all of its steps; the schedule is common.
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    steps = epochs * -(-count // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in tell_progress(range(epochs), epochs, 'linear probe: epoch'):
        for batch in torch.randperm(count, generator=order).to(device).split(batch_size):
            logits = torch.baddbmm(bias, features[batch].expand(len(rates), -1, -1), weight)
            target = labels[batch].expand(len(rates), -1)
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction='none').mean(dim=1)
            optimizer.zero_grad()
            (rates * losses).sum().backward()
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach().squeeze(1)


def select_linear_head(
    features: Tensor,
    labels: Tensor,
    cache_dir: str | Path | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 256,
    holdout: float = 0.1,
    seed: int = 0,
) -> tuple[nn.Linear, dict]:
    """The best head of a sweep of learning rates, by a held-out part of the training set.

    The head is that of the sweep, trained on the rest. It is kept in the cache, if there is one,
    under a name that changes with the features, the labels and the arguments.

    Args:
        features (Tensor): Training features, shape (N, C).
        labels (Tensor): Shape (N,).
        cache_dir (str | Path, optional): Folder of the cache. Defaults to None: no cache.
        learning_rates (Sequence[float]): See :func:`fit_linear_heads`. Defaults to 0.001 to 10.
        epochs (int): Defaults to 50.
        batch_size (int): Defaults to 256.
        holdout (float): Share of the training set that chooses, drawn at random. Defaults to 0.1.
        seed (int): Seed of the draw and of the order of the features. Defaults to 0.

    Returns:
        tuple: The head, and a dict of the choice: ``learning_rate``, and the top-1 accuracies on
        the held-out part, ``held_out``, by learning rate.

    Raises:
        ValueError: If ``holdout`` leaves no feature to train on or none to choose by.
    """
    count = round(holdout * len(features))
    if not 0 < count < len(features):
        raise ValueError(
            f'holdout={holdout} of {len(features)} training images is {count}; take more images, '
            'or a share that leaves some to train on and some to choose by.'
        )
    path = None
    if cache_dir is not None:
        settings = [list(learning_rates), epochs, batch_size, holdout, seed]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for tensor in (features, labels):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        path = Path(cache_dir, f'head-{digest.hexdigest()[:20]}.npz')
    classes = int(labels.max()) + 1
    shapes = [(features.shape[1], classes), (classes,), (), (len(learning_rates),)]

    def read(file: Path) -> dict[str, np.ndarray]:
        with np.load(file) as arrays:
            kept = {name: arrays[name] for name in ('weight', 'bias', 'best', 'top1')}
        if [array.shape for array in kept.values()] != shapes:
            raise ValueError('it holds another head')
        return kept

    found = read_kept(path, read) if path else None
    if found is None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        held, rest = order[:count], order[count:]
        weight, bias = fit_linear_heads(
            features[rest], labels[rest], learning_rates, classes, epochs, batch_size, seed
        )
        weight, bias = weight.cpu(), bias.cpu()
        scores = [features[held] @ w + b for w, b in zip(weight, bias, strict=True)]
        top1 = np.array([accuracy(x, labels[held])['top1'] for x in scores])
        best = int(top1.argmax())
        found = dict(weight=weight[best].numpy(), bias=bias[best].numpy(), best=best, top1=top1)
        if path is not None:
            with replacing(path) as part:
                np.savez(part, **found)
    weight, bias = (torch.from_numpy(found[name]) for name in ('weight', 'bias'))
    best, top1 = int(found['best']), found['top1'].tolist()
    head = nn.Linear(*weight.shape)
    head.load_state_dict(dict(weight=weight.T, bias=bias))
    return head, dict(
        learning_rate=learning_rates[best],
        held_out={str(rate): value for rate, value in zip(learning_rates, top1, strict=True)},
    )


def fit_head(
    source: CachedFeatures,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    probe_batch: int = 256,
) -> tuple[nn.Linear, dict, tuple[Tensor, Tensor] | Any]:
    """The linear probe of a run, the same on all ranks.

    All ranks extract the features, one fits the head.

    Args:
        source (CachedFeatures): Features of the run, whose ``evaluation.train`` it is fitted on.
            The head is kept in its cache.
        learning_rates (Sequence[float]): See :func:`fit_linear_heads`. Defaults to 0.001 to 10.
        epochs (int): Defaults to 50.
        probe_batch (int): Features per step. Defaults to 256.

    Returns:
        tuple: The head, its choice (see :func:`select_linear_head`), and the training features and
        labels, None on all ranks but the first.
    """
    train = source.load('train', main_only=True)
    found: list[Any] = [None]
    if is_main_process():
        sweep = learning_rates, epochs, probe_batch
        features, labels = train
        found = [select_linear_head(features, labels, source.cache_dir, *sweep)]
    broadcast_object_list(found)
    return *found[0], train
