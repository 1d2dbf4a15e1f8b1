import numpy as np
import pytest

from moe_jax.core.arrays import InputError, require_same_length, require_vectors


def test_lengths_that_agree():
    assert require_same_length(x=np.zeros((3, 2)), y=np.zeros(3)) == 3
    assert require_vectors(y=np.zeros(3), p=np.zeros(3)) == 3


@pytest.mark.parametrize("y", [np.zeros(4), np.zeros((3, 1)), np.zeros(())])
def test_other_shapes_are_named(y):
    with pytest.raises(InputError, match=r"y has shape .*expected \(3,\)"):
        require_same_length(x=np.zeros((3, 2)), y=y)


def test_a_column_is_not_a_vector():
    with pytest.raises(InputError, match=r"y has shape \(3, 1\), expected \(N,\)"):
        require_vectors(y=np.zeros((3, 1)), p=np.zeros(3))


def test_no_rows():
    with pytest.raises(InputError, match="at least one row"):
        require_same_length(x=np.zeros((0, 2)), y=np.zeros(0))
