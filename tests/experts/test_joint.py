import numpy as np
import pytest
from sklearn.linear_model import Ridge

from moe_jax import InputError, fit_mixture_experts, fit_weighted_ridge


@pytest.fixture(params=[(60, 12), (40, 90)], ids=["N > P", "N < P"])
def problem(request, rng):
    n, p = request.param
    x = rng.normal(size=(n, p)) + 3.0
    weights = rng.dirichlet([0.5, 0.5, 0.5], n)
    y = (weights * (x @ rng.normal(size=(p, 3)) + [1.0, -2.0, 5.0])).sum(axis=1) + rng.normal(size=n)
    return x, y, weights


def brute_force(x, y, weights, alpha):
    """The normal equations of all parameters at once: K blocks of penalised coefficients, K free intercepts."""
    p = x.shape[1]
    k = weights.shape[1]
    design = np.concatenate([weights[:, i : i + 1] * x for i in range(k)] + [weights], axis=1)
    penalty = np.diag(np.r_[np.full(k * p, alpha), np.zeros(k)])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    return solution[: k * p].reshape(k, p), solution[k * p :]


def test_closed_form_against_the_normal_equations(problem, x64):
    x, y, weights = problem
    experts = fit_mixture_experts(x, y, weights, 0.7)
    coef, intercept = brute_force(x, y, weights, 0.7)
    np.testing.assert_allclose(experts.coef, coef, atol=1e-9)
    np.testing.assert_allclose(experts.intercept, intercept, atol=1e-8)


def test_a_known_kernel_changes_nothing(problem, x64):
    """Whatever x is centred about: each expert has an intercept of its own."""
    x, y, weights = problem
    x = x - x.mean(axis=0) - 0.3
    part = np.arange(len(y)) % 3 > 0
    ours = fit_mixture_experts(x[part], y[part], weights[part], 0.7, kernel=(x @ x.T)[np.ix_(part, part)])
    coef, intercept = brute_force(x[part], y[part], weights[part], 0.7)
    np.testing.assert_allclose(ours.coef, coef, atol=1e-9)
    np.testing.assert_allclose(ours.intercept, intercept, atol=1e-8)


def test_one_expert_is_a_ridge_and_hard_weights_are_one_ridge_each(problem, x64):
    x, y, weights = problem
    one = fit_mixture_experts(x, y, np.ones((len(y), 1)), 3.0)
    oracle = Ridge(alpha=3.0).fit(x, y)
    np.testing.assert_allclose(one.coef[0], oracle.coef_, atol=1e-9)
    np.testing.assert_allclose(one.intercept[0], oracle.intercept_, atol=1e-8)
    hard = np.eye(3)[weights.argmax(axis=1)]
    experts = fit_mixture_experts(x, y, hard, 3.0)
    for k in range(3):
        own = hard[:, k] == 1
        oracle = Ridge(alpha=3.0).fit(x[own], y[own])
        np.testing.assert_allclose(experts.coef[k], oracle.coef_, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_weighted_ridge_against_scikit_learn(problem, rng, x64, scale):
    x, y, _ = problem
    s = scale * rng.exponential(size=len(y)) * (rng.random(len(y)) < 0.8)
    ours = fit_weighted_ridge(x, y, s, 0.4)
    oracle = Ridge(alpha=0.4, solver="cholesky").fit(x, y, sample_weight=s)
    np.testing.assert_allclose(ours.coef, oracle.coef_, atol=1e-8)
    np.testing.assert_allclose(ours.intercept, oracle.intercept_, atol=1e-7)


def test_weighted_ridge_in_float32(problem, rng):
    x, y, _ = problem
    s = rng.exponential(size=len(y))
    ours = fit_weighted_ridge(x.astype(np.float32), y.astype(np.float32), s.astype(np.float32), 1.0)
    oracle = Ridge(alpha=1.0).fit(x, y, sample_weight=s)
    np.testing.assert_allclose(ours.coef, oracle.coef_, atol=2e-4)


def test_bad_input(problem):
    x, y, weights = problem
    with pytest.raises(InputError, match="weights has shape"):
        fit_mixture_experts(x, y, weights[:5], 1.0)
    with pytest.raises(InputError, match="alpha is -1"):
        fit_mixture_experts(x, y, weights, -1.0)
    with pytest.raises(InputError, match="kernel has shape"):
        fit_mixture_experts(x, y, weights, 1.0, kernel=np.eye(3))
    with pytest.raises(InputError, match="sample_weight holds"):
        fit_weighted_ridge(x, y, -np.ones(len(y)), 1.0)
