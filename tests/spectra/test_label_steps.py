import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.spectra.label_model import chebyshev_terms, default_model
from moe_jax.spectra.label_point import UNITS, at_rest, model_point, model_rows
from moe_jax.spectra.label_steps import Problem, solve


@pytest.mark.slow
@pytest.mark.parametrize("additive", [0.0, 1.0])
def test_the_gradient_is_that_of_chi2(additive):
    """Oracle: differences of chi2 in float64, for which the polynomial (and the constant) are solved by LAPACK."""
    survey = moe_jax.simulate_survey(jax.random.key(8), 6)
    labels = np.stack([np.asarray(getattr(survey.labels, name)) for name in ("T_eff", "log_g", "M_H", "a_M")], axis=1)
    with jax.enable_x64(True):
        x = jnp.asarray(np.column_stack([0.98 * labels[:, 0], labels[:, 1:], np.full(6, 3.0), np.full(6, 0.8)]))
        x = x.at[:, 1].set(jnp.clip(x[:, 1], 1.2, 4.8))
        flux, weight = (jnp.asarray(np.asarray(array), jnp.float64) for array in (survey.flux, (0.01 * survey.error) ** -2.0))
        data = at_rest(flux, weight, jnp.zeros(6), jnp.full(6, additive))
        model = default_model()
        model = model._replace(axes=tuple(tuple(map(float, axis)) for axis in model.axes))
        fine = model.fine._replace(slope_basis=model.fine.basis[1:])  # derivatives of all components
        model = model._replace(fine=fine, broaden_slopes=model.broaden[..., 1:])
        problem = Problem(model, model.fine, (0, 1, 2, 3, 4, 5), 9)
        state, weight = solve(problem, x, data, data.weight, 0, 1.0)

        def chi2(x):
            spectra = np.asarray(model_point(model_rows(x, model), x, data, model.fine).spectrum)
            root = np.sqrt(np.asarray(weight))
            return [
                np.linalg.lstsq(columns.T, root[i] * np.asarray(data.flux)[i], rcond=None)[1][0]
                for i in range(6)
                for columns in [np.vstack([spectra[i] * chebyshev_terms(4096, 9), *([np.ones(4096)] * int(additive))]) * root[i]]
            ]

        steps = 1e-3 * UNITS * np.eye(6)
        slopes = np.stack([(np.array(chi2(x + step)) - chi2(x - step)) / 2e-3 for step in steps[:, None]], axis=1)
        deviation = 1 / np.sqrt(np.einsum("nii->ni", state.products[:, :6, :6]))
        if additive:  # nothing is left along the constant
            assert np.max(np.abs(state.products[:, :6, 7]) * deviation) < 1e-6
        np.testing.assert_allclose(state.products[:, :6, 6] * deviation, -0.5 * slopes * deviation, rtol=1e-3, atol=1e-2)
