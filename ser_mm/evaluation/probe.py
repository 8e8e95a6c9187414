import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    regularization: float = 1.0,
    max_iter: int = 1000,
) -> float:
    """Accuracy of a logistic regression on frozen features.

    The features are standardized by the mean and deviation of the training set, and the regression
    is solved to convergence, so nothing but its regularization is to be tuned.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        val_labels (Tensor): Shape (M,).
        regularization (float): Weight of the squared norm relative to the summed loss, the
            inverse of scikit-learn's ``C``. Defaults to 1.0.
        max_iter (int): Limit of the solver's iterations. Defaults to 1000.

    Returns:
        float: Share of the validation features classified rightly, in [0, 1].
    """
    regression = LogisticRegression(C=1 / regularization, max_iter=max_iter)
    # The solver's steps are so short that threads spend their time waiting for each other.
    with threadpool_limits(1):
        probe = make_pipeline(StandardScaler(), regression).fit(train.numpy(), train_labels.numpy())
    return float(probe.score(val.numpy(), val_labels.numpy()))


def knn_probe(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour vote on frozen features.

    A neighbour votes with weight ``exp(cosine similarity / temperature)``, as in instance
    discrimination (Wu et al., arXiv 1805.01978) and DINO.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        val_labels (Tensor): Shape (M,).
        k (int): Neighbours, at most N of them. Defaults to 20.
        temperature (float): Defaults to 0.07.

    Returns:
        float: Share of the validation features classified rightly, in [0, 1].
    """
    vote = KNeighborsClassifier(
        n_neighbors=min(k, len(train)),
        metric='cosine',
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(train.numpy(), train_labels.numpy())
    return float(vote.score(val.numpy(), val_labels.numpy()))
