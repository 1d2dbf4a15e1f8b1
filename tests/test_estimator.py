import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from moe_jax import RidgeMixtureRegressor

SMALL = {"n_experts": 2, "hidden": 4, "epochs": 3, "alphas": (0.1, 10.0), "random_state": 0}
CHECKS = list(estimator_checks_generator(RidgeMixtureRegressor(**SMALL | {"gate": "linear", "n_folds": 2})))


def name_of(check):
    return getattr(check[1].func, "__name__", str(check[1]))


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_scikit_learn_takes_it_for_a_regressor(check):
    estimator, run = check
    run(estimator)


@pytest.mark.slow
def test_cross_validated_score_and_clone():
    x, y = load_diabetes(return_X_y=True)
    scores = cross_val_score(RidgeMixtureRegressor(2, hidden=8, epochs=50, random_state=0), x, y, cv=3)
    assert scores.mean() > 0.4
    model = clone(RidgeMixtureRegressor(3, alphas=(1.0,), gate="linear", n_folds=3))
    assert model.get_params() == {
        "n_experts": 3, "alphas": (1.0,), "gate": "linear", "hidden": 32, "epochs": 300, "learning_rate": 1e-3, "n_folds": 3,
        "random_state": None,
    }  # fmt: skip


@pytest.mark.slow
def test_own_cells_weights_and_pickle():
    x, y = load_diabetes(return_X_y=True)
    model = RidgeMixtureRegressor(**SMALL).fit(x, y, cell=(x[:, 2] > 0).astype(int))
    np.testing.assert_array_equal(model.cell_, x[:, 2] > 0)
    weights = model.predict_weights(x)
    assert weights.shape == (len(x), 2)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    assert model.predict(x).dtype == np.float64


def test_small_clusters_are_merged():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 0.1, (60, 2)), rng.normal(9, 0.1, (60, 2)), rng.normal(30, 0.1, (3, 2))])
    model = RidgeMixtureRegressor(**SMALL | {"n_experts": 3}).fit(x, x[:, 0])
    assert np.bincount(model.cell_).min() >= 10
    assert (model.cell_[-3:] == model.cell_[60]).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_experts": 0}, "n_experts is 0, expected a whole number, at least 1"),
        ({"n_experts": 2.5}, "n_experts is 2.5"),
        ({"gate": "tree"}, "gate is 'tree', expected 'mlp' or 'linear'"),
        ({"n_folds": 1}, "n_folds is 1, expected a whole number, at least 2"),
        ({"epochs": 0}, "epochs is 0, expected a whole number, at least 1"),
        ({"alphas": (0.0,)}, "expected positive numbers"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    x, y = load_diabetes(return_X_y=True)
    with pytest.raises(ValueError, match=message):
        RidgeMixtureRegressor(**SMALL | parameters).fit(x, y)
