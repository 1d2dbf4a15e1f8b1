import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import Ridge

from moe_jax.experts.sums import hold_out_each, moments, solve_moments, sum_stars


def test_sums_of_parts_add_up_and_give_the_ridge(x64, rng):
    """A part is held out by subtraction: the fit is that of scikit-learn to the rest."""
    x, y = rng.normal(size=(80, 12)) + 0.3, rng.normal(size=80)
    x[70:], y[70:] = 0.0, 0.0
    mask = (np.arange(80) < 70).astype(float)
    part = np.arange(80) < 25
    total, own = sum_stars(x, y, mask), sum_stars(x[part], y[part], mask[part])
    train = moments(jax.tree.map(jnp.subtract, total, own))
    fit = solve_moments(train, jnp.asarray(0.7))
    oracle = Ridge(alpha=0.7, solver="svd").fit(x[25:70], y[25:70])
    np.testing.assert_allclose(fit.coef, oracle.coef_, atol=1e-12)
    np.testing.assert_allclose(fit.intercept, oracle.intercept_, atol=1e-12)
    np.testing.assert_allclose(total.yy, np.sum(y**2))


def test_each_part_is_held_out_by_subtraction(x64, rng):
    """Against the sums of the other parts, added up star by star."""
    x, y, part = rng.normal(size=(30, 4)), rng.normal(size=30), np.arange(30) % 3
    by_part = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(sum_stars(x[i], y[i], np.ones(10)) for i in part_rows(part)))
    parts, rest = hold_out_each(lambda own, rest: (own, rest), by_part)
    for i, rows in enumerate(part_rows(part)):
        others = np.setdiff1d(np.arange(30), rows)
        expected = sum_stars(x[others], y[others], np.ones(20))
        jax.tree.map(lambda ours, theirs, i=i: np.testing.assert_allclose(ours[i], theirs, atol=1e-12), rest, expected)
    jax.tree.map(np.testing.assert_array_equal, parts, by_part)


def part_rows(part):
    return [np.flatnonzero(part == i) for i in range(3)]
