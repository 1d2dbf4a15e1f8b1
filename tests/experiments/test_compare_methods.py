"""The pieces of the comparison of methods."""

import numpy as np
from sklearn.cross_decomposition import PLSRegression

from experiments.compare_methods import Spectra, choose, fit_pls
from moe_jax.experts.ridge import predict_ridge
from moe_jax.spectra.survey import Labels


def test_pls_is_scikit_learns(rng):
    x = rng.normal(size=(300, 20)) * np.geomspace(5, 0.2, 20) + 3.0
    y = x @ rng.normal(size=20) + rng.normal(size=300)
    for number in (1, 3, 6):
        peer = PLSRegression(number, scale=False).fit(x, y).predict(x)
        np.testing.assert_allclose(predict_ridge(fit_pls(x, y, number), np.asarray(x, np.float32)), peer, atol=2e-3)


def test_the_candidate_of_the_lowest_held_out_error_is_fitted_to_all_stars(rng):
    log_g = rng.normal(size=50).astype(np.float32)
    labels = Labels(*(log_g for _ in Labels._fields))
    train = Spectra(log_g[:, None], np.ones((50, 1)), labels)
    fitted = []

    def fit(factor, rows):
        fitted.append((factor, len(rows)))
        return lambda stars: factor * stars.flux[:, 0]

    predict = choose([0.0, 1.0, 3.0], fit, train)
    assert fitted == [(0.0, 40), (1.0, 40), (3.0, 40), (1.0, 50)]
    np.testing.assert_array_equal(predict(train), log_g)
