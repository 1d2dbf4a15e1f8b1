import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import moe_jax
from moe_jax import InputError, fit_ridge, fit_weighted_ridge, predict_ridge
from moe_jax.experts.sums import moments, solve_moments, sum_stars


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="session")
def tall_spectra():
    """More stars than pixels: 6,000 spectra of 512 pixels."""
    survey = moe_jax.simulate_survey(jax.random.key(11), 6_000)
    flux = moe_jax.add_noise(jax.random.key(12), survey.flux[:, ::8], survey.error[:, ::8], 0.2)
    return np.asarray(flux), np.asarray(survey.labels.log_g)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1e-2, 1e5])
@pytest.mark.parametrize("shape", ["spectra", "tall_spectra"])
def test_against_scikit_learn_on_spectra(shape, alpha, request):
    x, y = request.getfixturevalue(shape)
    train, held = slice(None, -500), slice(-500, None)
    oracle = Ridge(alpha=alpha, solver="cholesky").fit(x[train].astype(float), y[train].astype(float))
    theirs = oracle.predict(x.astype(float))
    for enabled, tolerance in ((False, 1e-5), (True, 1e-10)):
        with jax.enable_x64(enabled):
            dtype = float if enabled else np.float32
            ours = predict_ridge(fit_ridge(x[train].astype(dtype), y[train].astype(dtype), alpha), x.astype(dtype))
            assert ours.dtype == dtype
            assert relative_error(ours[held], theirs[held]) < tolerance
            assert relative_error(ours[train], theirs[train]) < tolerance


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_normal_equations(shape, x64, rng):
    """The gradient of the penalised objective vanishes, for coefficients and intercept."""
    x, y = rng.normal(size=shape) + 5, rng.normal(size=shape[0])
    fit = fit_ridge(x, y, 0.3)
    residual = y - predict_ridge(fit, x)
    np.testing.assert_allclose(x.T @ residual, 0.3 * fit.coef, atol=1e-10)
    np.testing.assert_allclose(np.sum(residual), 0, atol=1e-10)


def test_primal_and_dual_agree(x64, rng):
    """Adding pixels of zeros turns the primal form into the dual form and changes nothing."""
    x, y = rng.normal(size=(60, 20)), rng.normal(size=60)
    primal, dual = fit_ridge(x, y, 0.7), fit_ridge(np.pad(x, ((0, 0), (0, 80))), y, 0.7)
    np.testing.assert_allclose(dual.coef[:20], primal.coef, atol=1e-12)
    np.testing.assert_allclose(dual.coef[20:], 0, atol=1e-12)


def test_invariant_to_permutation_and_rotation(x64, rng):
    x, y = rng.normal(size=(50, 30)), rng.normal(size=50)
    rotation = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    order = rng.permutation(50)
    plain, changed = fit_ridge(x, y, 0.5), fit_ridge((x @ rotation)[order], y[order], 0.5)
    np.testing.assert_allclose(predict_ridge(changed, x @ rotation), predict_ridge(plain, x), atol=1e-11)


def test_constant_target(dtype, rng):
    x = rng.normal(size=(20, 30)).astype(dtype)
    fit = fit_ridge(x, np.full(20, 2.5, dtype), 1.0)
    np.testing.assert_allclose(predict_ridge(fit, x), 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((5, 3)), np.zeros((5, 1)), 1.0), r"y has shape \(5, 1\)"),
        ((np.zeros((5, 3)), np.zeros(5), 0.0), "alpha is 0.0, expected positive"),
        ((np.zeros((5, 3)), np.zeros(5), np.nan), "alpha is nan"),
        ((np.zeros((5, 3)), np.zeros(5), "1"), "alpha is 1, expected positive numbers"),
        ((np.zeros((5, 3)), np.zeros(5), 1j), "alpha is 1j, expected positive numbers"),
        ((np.zeros((5, 3)), np.zeros(5), np.ones(2)), r"alpha is \[1. 1.\] for x of shape \(5, 3\), expected one penalty"),
        ((np.zeros((5, 0)), np.zeros(5), 1.0), r"x of shape \(5, 0\), expected one penalty, and at least one column"),
        ((np.zeros((5, 3)), np.zeros(5), 1.0, np.zeros((5, 3))), r"tangents has shape \(5, 3\), expected \(5, T, 3\)"),
        ((np.zeros((5, 3)), np.zeros(5), 1.0, np.zeros((3, 2, 5))), r"tangents has shape \(3, 2, 5\), expected \(5, T, 3\)"),
        ((np.zeros((5, 3)), np.zeros(5), 1.0, np.full((5, 2, 3), np.nan)), "tangents holds numbers that are not finite"),
    ],
)
def test_bad_input(arguments, message):
    x, y, alpha, *tangents = arguments
    with pytest.raises(InputError, match=message):
        fit_ridge(x, y, alpha, tangents=tangents[0] if tangents else None)
    if tangents:
        with pytest.raises(InputError, match=message):
            fit_weighted_ridge(x, y, np.ones(5), alpha, tangents=tangents[0])


def test_other_columns_than_in_the_fit(rng):
    with pytest.raises(InputError, match=r"x has shape \(5, 4\), expected \(N, 3\) as in the fit"):
        predict_ridge(fit_ridge(rng.normal(size=(5, 3)), np.arange(5), 1.0), np.ones((5, 4)))


def test_fit_vmaps(x64, rng):
    x, y = jnp.asarray(rng.normal(size=(20, 8))), jnp.asarray(rng.normal(size=(3, 20)))
    coefs = jax.vmap(lambda target: fit_ridge(x, target, 1.0).coef)(y)
    for target, coef in zip(y, coefs, strict=True):
        np.testing.assert_allclose(coef, fit_ridge(x, target, 1.0).coef, atol=1e-12)


def copies(x, tangents, e):
    """Each star moved along its tangents by e (N, B, T): (N B, P)."""
    return (x[:, None] + np.einsum("nbt,ntp->nbp", e, tangents)).reshape(-1, x.shape[1])


@pytest.fixture(params=[(20, 90), (20, 30)], ids=["dual", "primal"])
def moved(request, rng):
    """20 stars far from 0, with two tangents each: features, target, weights, tangents."""
    n, p = request.param
    return rng.normal(size=(n, p)) + 5, rng.normal(size=n), rng.uniform(0.1, 3, n), rng.normal(size=(n, 2, p)) * [[1.0], [0.3]]


def test_tangents_are_copies_at_both_ends(moved, dtype):
    """Copies at +-root(T) times each of T tangents have exactly the variance of the nuisance; by scikit-learn, in float64."""
    x, y, weight, tangents = moved
    e = np.concatenate([np.eye(2), -np.eye(2)]) * np.sqrt(2)
    many = copies(x, tangents, np.broadcast_to(e, (len(x), 4, 2)))
    ours, tolerance = [array.astype(dtype) for array in (x, y, weight, tangents)], 1e-4 if dtype == np.float32 else 1e-10
    for fit, of_star in (
        (fit_ridge(*ours[:2], 0.7, tangents=ours[3]), np.ones_like(weight)),
        (fit_weighted_ridge(*ours[:3], 0.7, tangents=ours[3]), weight),
    ):
        theirs = Ridge(0.7).fit(many, np.repeat(y, 4), np.repeat(of_star / 4, 4))
        assert fit.coef.dtype == dtype
        assert relative_error(fit.coef, theirs.coef_) < tolerance
        assert fit.intercept == pytest.approx(theirs.intercept_, rel=tolerance)
    assert relative_error(fit_ridge(x, y, 0.7).coef, theirs.coef_) > 0.1


def test_random_copies_converge_to_tangents(x64, rng):
    x, y, tangents = rng.normal(size=(20, 6)), rng.normal(size=20), rng.normal(size=(20, 2, 6))
    ours = fit_ridge(x, y, 0.7, tangents=tangents)
    errors = []
    for n_copies in (20, 20_000):
        many, targets = copies(x, tangents, rng.normal(size=(20, n_copies, 2))), np.repeat(y, n_copies)
        errors.append(relative_error(ours.coef, Ridge(0.7 * n_copies).fit(many, targets).coef_))
    assert errors[1] < 0.01 < errors[0]


def test_tangents_in_sums_and_under_transformations(moved, x64):
    x, y, _, tangents = moved
    fit, rows = fit_ridge(x, y, 0.7, tangents=tangents), tangents.reshape(-1, x.shape[1])
    sums = sum_stars(x, y, np.ones(len(x)))
    np.testing.assert_allclose(solve_moments(moments(sums._replace(xx=sums.xx + rows.T @ rows)), 0.7).coef, fit.coef, atol=1e-9)
    stretched = jax.jit(jax.vmap(lambda tau: fit_ridge(x, y, 0.7, tangents=tau * tangents)))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(stretched.coef[0], fit_ridge(x, y, 0.7).coef, atol=1e-11)
    np.testing.assert_allclose(stretched.coef[1], fit.coef, atol=1e-11)
    np.testing.assert_array_equal(fit_ridge(x, y, 0.7, tangents=tangents[:, :0]).coef, fit_ridge(x, y, 0.7).coef)
