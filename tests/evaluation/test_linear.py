"""Linear probes: at convergence scikit-learn's, and a sweep that a held-out part chooses from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from ser_mm.evaluation import fit_linear_heads, linear_probe, select_linear_head
from ser_mm.evaluation.linear import SOLVABLE, choose_solver
from tests.support.rounding import rounding


@pytest.fixture
def in_float64():
    """Heads are of torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_linear_probe_at_convergence_is_the_logistic_regression(features, in_float64):
    """Both are as close to the optimum as their gradient and the curvature of the loss tell.

    The loss is strictly convex but for adding the same to all classes, one direction for each of
    four weights and the bias: the classes overlap.
    """
    (x, v), (y, w) = (part.double() for part in features[:2]), features[2:]
    weight, bias = fit_linear_heads(x, y, [1.0], epochs=1000, batch_size=len(x))
    regression = LogisticRegression(C=np.inf, solver='newton-cg', tol=1e-10, max_iter=1000)
    regression.fit(x.numpy(), y.numpy())

    def loss(head):
        return F.cross_entropy(x @ head[:-1] + head[-1], y)

    ours = torch.cat([weight[0], bias])
    theirs = np.vstack([regression.coef_.T, regression.intercept_])
    theirs = torch.from_numpy(theirs)
    flat = torch.autograd.functional.hessian(loss, ours).reshape(ours.numel(), -1)
    *same, least = torch.linalg.eigvalsh(flat)[:6]
    assert max(same) < 1e-12 and least > 0.01
    off = sum(torch.func.grad(loss)(head).norm() / least for head in (ours, theirs))
    assert off < 1e-6

    probabilities = (v @ weight[0] + bias[0]).softmax(dim=1)
    expected = torch.from_numpy(regression.predict_proba(v.numpy()))
    # Probabilities change less than logits, by rounding at least.
    bound = off * (1 + v.norm(dim=1).max()) + 1e-12
    assert (probabilities - expected).abs().max() < bound
    assert 0.2 < regression.score(v.numpy(), w.numpy()) < 0.9


def test_a_head_does_not_depend_on_the_others(features, in_float64):
    x, y = features[0].double(), features[2]
    rates = [0.01, 1.0, 1e308]  # the last one diverges
    together = fit_linear_heads(x, y, rates, epochs=3, batch_size=64)
    for i, rate in enumerate(rates[:2]):
        alone = fit_linear_heads(x, y, [rate], epochs=3, batch_size=64)
        for a, b in zip(together, alone, strict=True):
            # 36 steps of a descent, which makes errors smaller, on sums of 64 products around 1
            torch.testing.assert_close(a[i], b[0], rtol=0, atol=rounding(36 * 100, 1))
    assert not together[0][2].isfinite().all()


def test_the_held_out_part_chooses_and_the_choice_is_kept(features, tmp_path):
    x, v, y, w = features
    rates = [0.0, 1.0, 1e38]
    head, choice = select_linear_head(x, y, tmp_path, rates, epochs=5)
    nothing, half, *_ = choice['held_out'].values()
    assert choice['learning_rate'] == 1.0 and half == max(choice['held_out'].values())
    assert nothing < 0.3 and half > 0.45  # one class in six, and what the overlap allows: 0.52
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again, same = select_linear_head(x, y, tmp_path, rates, epochs=5)
    assert file.stat().st_mtime_ns == written and same == choice
    assert torch.equal(head(v), again(v))
    select_linear_head(x, y, tmp_path, [1.0], epochs=5)
    select_linear_head(x[1:], y[1:], tmp_path, rates, epochs=5)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match='holdout=0.0001 of 720 training images is 0'):
        select_linear_head(x, y, tmp_path, holdout=0.0001)


def test_a_damaged_head_is_fitted_again(features, tmp_path, capsys):
    x, v, y, w = features
    head, choice = select_linear_head(x, y, tmp_path, [1.0], epochs=1)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    other, _ = select_linear_head(x[:, :3], y, tmp_path / 'other', [1.0], epochs=1)
    (wrong,) = (tmp_path / 'other').iterdir()
    for content in (b'', whole[:100], whole[:-1], b'text', wrong.read_bytes()):
        file.write_bytes(content)
        again, same = select_linear_head(x, y, tmp_path, [1.0], epochs=1)
        assert torch.equal(head(v), again(v)) and same == choice
        assert f'{file} cannot be read' in capsys.readouterr().out
        assert np.load(file).files == ['weight', 'bias', 'best', 'top1']


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
