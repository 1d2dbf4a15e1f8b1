import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

from moe_jax import RidgeMixtureRegressor

SMALL = {"n_experts": 2, "hidden": 4, "epochs": 3, "alphas": (0.1, 10.0), "random_state": 0}
CHECKS = list(estimator_checks_generator(RidgeMixtureRegressor(**SMALL)))


def name_of(check):
    return getattr(check[1].func, "__name__", str(check[1]))


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_scikit_learn_takes_it_for_a_regressor(check):
    estimator, run = check
    run(estimator)
