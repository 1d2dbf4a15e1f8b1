import numpy as np
import pytest

from moe_jax import load_grid
from moe_jax.spectra.grid import reconstruct_nodes
from moe_jax.spectra.synthesis import Node, is_available, synthesize_node

needs_synthesis = pytest.mark.skipif(not is_available(), reason="the extra 'synthesis' is not installed")


@pytest.mark.slow
@needs_synthesis
def test_a_node_is_computed_again():
    nodes = reconstruct_nodes(load_grid())
    spectrum = synthesize_node(Node(T_eff=5500.0, log_g=4.0, M_H=-1.0, a_M=0.5))
    difference = np.asarray(nodes.norm[4, 3, 3, 2]) - spectrum.norm
    assert np.sqrt(np.mean(difference**2)) <= 1e-3
    np.testing.assert_allclose(nodes.log_continuum[4, 3, 3, 2], spectrum.log_continuum, atol=1e-3)


@needs_synthesis
def test_no_such_model():
    with pytest.raises(ValueError, match="no MARCS model at T_eff 4123"):
        synthesize_node(Node(4123.0, 4.0, 0.0, 0.0))


@pytest.mark.skipif(is_available(), reason="the extra 'synthesis' is installed")
def test_what_to_install_is_said():
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[synthesis\]'"):
        synthesize_node(Node(5500.0, 4.0, -1.0, 0.5))
