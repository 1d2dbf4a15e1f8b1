import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from moe_jax import InputError, cross_validate_ridge
from moe_jax.experts import cross_validation


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


def brute_force(x, y, alphas, folds):
    predictions, targets = np.zeros((len(alphas), len(y))), np.repeat(y[:, None], len(alphas), axis=1)
    for fold in np.unique(folds):
        held = folds == fold
        predictions[:, held] = Ridge(alpha=alphas, solver="svd").fit(x[~held], targets[~held]).predict(x[held]).T
    return predictions


ASSIGNMENTS = {
    "five": lambda n, rng: rng.permutation(n) % 5,
    "unequal": lambda n, rng: np.minimum(rng.integers(0, 9, n), 3) - 7,
    "thirteen": lambda n, rng: rng.permutation(n) % 13,
    "leave-one-out": lambda n, rng: rng.permutation(n),
    "two": lambda n, rng: rng.integers(0, 2, n),
}


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("shape", [(60, 100), (150, 40), (100, 100)])
def test_cross_validation_against_refitting(shape, assignment, x64, rng):
    x = rng.normal(size=shape) + 3
    y = x @ rng.normal(size=shape[1]) + rng.normal(size=shape[0])
    folds, alphas = ASSIGNMENTS[assignment](shape[0], rng), [1e-3, 0.1, 10.0, 1e4]
    cv = cross_validate_ridge(x, y, np.array(alphas), folds)
    expected = brute_force(x, y, alphas, folds)
    np.testing.assert_allclose(cv.predictions, expected, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(cv.mse, np.mean((expected - y) ** 2, axis=1), rtol=1e-8)


@pytest.mark.parametrize("n_folds", [2, 6])
def test_both_exact_primal_forms_agree(n_folds, x64, rng, monkeypatch):
    """Whatever the costs say, one factor for all folds and one for each give the same."""
    x, y, folds = rng.normal(size=(150, 40)), rng.normal(size=150), rng.permutation(150) % n_folds
    results = []
    for cost in (1e-9, 1e9):
        monkeypatch.setattr(cross_validation, "CHOLESKY_COST", cost)
        results.append(cross_validate_ridge(x, y, np.array([0.1, 1.0]), folds).predictions)
    np.testing.assert_allclose(*results, atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_under_jit(shape, x64, rng):
    """Inside another compiled program, where LAPACK cannot be called, the result is the same."""
    x, y, folds, alphas = rng.normal(size=shape), rng.normal(size=shape[0]), np.arange(shape[0]) % 4, np.array([0.1, 1.0])
    compiled = jax.jit(lambda x, y: cross_validate_ridge(x, y, alphas, folds).predictions)(x, y)
    np.testing.assert_allclose(compiled, cross_validate_ridge(x, y, alphas, folds).predictions, atol=1e-10)


@pytest.mark.slow
def test_out_of_fold_predictions_in_float32(spectra, rng):
    x, y = spectra[0][:1000], spectra[1][:1000]
    folds = rng.permutation(1000) % 5
    cv = cross_validate_ridge(x, y, np.array([1e-2, 1.0, 1e2]), folds)
    expected = np.zeros((3, 1000))
    for i, alpha in enumerate([1e-2, 1.0, 1e2]):
        for fold in range(5):
            held = folds == fold
            oracle = Ridge(alpha=alpha, solver="cholesky").fit(x[~held].astype(float), y[~held].astype(float))
            expected[i, held] = oracle.predict(x[held].astype(float))
    assert relative_error(cv.predictions[0], expected[0]) < 1e-3
    assert relative_error(cv.predictions[1:], expected[1:]) < 1e-4


def test_one_fold_is_no_cross_validation():
    with pytest.raises(InputError, match="1 different values, expected at least 2"):
        cross_validate_ridge(np.zeros((5, 3)), np.zeros(5), np.ones(1), np.zeros(5, int))


def test_no_alphas():
    with pytest.raises(InputError, match="alpha is .*expected positive numbers"):
        cross_validate_ridge(np.zeros((5, 3)), np.zeros(5), np.zeros(0), np.arange(5))
