"""Linear probes: at convergence scikit-learn's, and a sweep that a held-out part chooses from."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ser_mm.evaluation import fit_linear_heads, linear_probe, select_linear_head
from ser_mm.evaluation.linear import SOLVABLE, choose_solver


def test_linear_probe_at_convergence_is_the_logistic_regression(features):
    x, v, y, w = features
    weight, bias = fit_linear_heads(x, y, [1.0], epochs=4000, batch_size=len(x))
    probabilities = (v @ weight[0] + bias[0]).softmax(dim=1).numpy()
    regression = LogisticRegression(C=np.inf, tol=1e-6, max_iter=2000).fit(x.numpy(), y.numpy())
    assert np.abs(probabilities - regression.predict_proba(v.numpy())).max() < 0.02
    agree = probabilities.argmax(1) == regression.predict(v.numpy())
    assert agree.mean() >= 0.99 and 0.2 < regression.score(v.numpy(), w.numpy()) < 0.9


def test_a_head_does_not_depend_on_the_others(features):
    x, _, y, _ = features
    rates = [0.01, 1.0, 1e30]  # the last one diverges
    together = fit_linear_heads(x, y, rates, epochs=3, batch_size=64)
    for i, rate in enumerate(rates[:2]):
        alone = fit_linear_heads(x, y, [rate], epochs=3, batch_size=64)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0])


def test_the_held_out_part_chooses_and_the_choice_is_kept(features, tmp_path):
    x, v, y, w = features
    head, choice = select_linear_head(x, y, tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert (
        choice['learning_rate'] == 1.0 == float(max(choice['held_out'], key=choice['held_out'].get))
    )
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again, same = select_linear_head(x, y, tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert file.stat().st_mtime_ns == written and same == choice
    assert torch.equal(head(v), again(v))
    select_linear_head(x, y, tmp_path, [1.0], epochs=5)
    select_linear_head(x[1:], y[1:], tmp_path, [1e-6, 1.0, 1e30], epochs=5)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match='holdout=0.0001 of 720 training images is 0'):
        select_linear_head(x, y, tmp_path, holdout=0.0001)


def test_the_solver_is_an_argument(features, tmp_path):
    x, v, y, w = features
    head, _ = select_linear_head(x, y)
    share = float((head(v).argmax(dim=1) == w).double().mean())
    assert linear_probe(x, y, v, w, solver='sgd', cache_dir=tmp_path) == pytest.approx(share)
    assert len(list(tmp_path.iterdir())) == 1  # the head
    assert linear_probe(x, y, v, w) == linear_probe(x, y, v, w, solver='lbfgs')
    with pytest.raises(ValueError, match="solver='adam': choose one of lbfgs, sgd"):
        linear_probe(x, y, v, w, solver='adam')
    assert (choose_solver(SOLVABLE), choose_solver(SOLVABLE + 1)) == ('lbfgs', 'sgd')
