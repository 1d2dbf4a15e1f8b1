import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

import moe_jax
from moe_jax import InputError, load_grid, simulate_survey
from moe_jax.gates.features import line_features, line_pixels
from moe_jax.spectra import simulate
from moe_jax.spectra.grid import reconstruct_nodes
from moe_jax.spectra.pixels import PIXEL_EDGES, WAVE, average_pixels, pixel_sides
from moe_jax.spectra.simulate import LABEL_LATTICE, draw_labels, flux_error, median_rows
from moe_jax.spectra.sky import oh_lines, sky_variance, throughput

model_flux = jax.jit(functools.partial(simulate.model_flux, load_grid()))
BANDS = ((7240, 7600), (7700, 8100), (8280, 8500), (8760, 8900))


@pytest.fixture(scope="module")
def labels():
    return {name: np.asarray(values) for name, values in draw_labels(jax.random.key(0), 100_000).items()}


def test_each_star_keeps_one_continuous_label(labels):
    on_node = np.stack(
        [
            np.isclose((labels[n] - low) / step, np.round((labels[n] - low) / step), atol=1e-4)
            for n, (low, _, step) in LABEL_LATTICE.items()
        ]
    )
    assert (on_node.sum(axis=0) >= 4).all()
    assert np.mean(on_node.sum(axis=0) == 4) > 0.99
    for name, (low, high, _) in LABEL_LATTICE.items():
        assert labels[name].min() >= low - 1e-5
        assert labels[name].max() <= high + 1e-5
    assert 20.5 <= labels["mag"].min() < 20.51
    assert 22.49 < labels["mag"].max() <= 22.5


def test_coverage(labels):
    cell = np.asarray(moe_jax.assign_cells(labels["T_eff"], labels["M_H"]))
    assert abs((cell >= 0).mean() - 0.83) < 0.01


def test_uniform_labels_are_continuous():
    labels = draw_labels(jax.random.key(0), 1_000, "uniform")
    assert len(np.unique(labels["log_g"])) > 990


def test_fluxes(survey):
    flux = np.asarray(survey.flux)
    np.testing.assert_allclose(np.median(flux, axis=1), 0.5, atol=1e-6)
    assert flux.min() >= 0
    assert np.isfinite(survey.error).all()
    assert (np.asarray(survey.error) > 0).all()


@pytest.mark.parametrize(("mag", "expected"), [(20.0, 0.021), (21.5, 0.070), (22.5, 0.169)])
def test_median_error_by_magnitude(survey, mag, expected):
    error = flux_error(jnp.full(500, mag), survey.flux[:500])
    assert np.median(error) == pytest.approx(expected, rel=0.1)


def test_mean_signal_to_noise(survey):
    assert np.mean(survey.labels.snr) == pytest.approx(7, rel=0.15)


def test_sky():
    sky = sky_variance()
    assert np.median(sky) == pytest.approx(1)
    in_band = np.any([(low <= WAVE) & (high >= WAVE) for low, high in BANDS], axis=0)
    floor = np.minimum.accumulate(sky)
    assert 0.80 < np.sqrt(sky[-400:].min() / sky[:200].min()) < 0.90
    assert np.mean(sky[~in_band] > 1.4) < 0.05 < np.mean(sky[in_band] > 1.4)
    assert 5 < (sky / floor).max() < 6
    waves, strengths = oh_lines()
    in_arm = (waves > WAVE[0]) & (waves < WAVE[-1])
    strong = waves[in_arm][np.argsort(strengths[in_arm])[-12:]]
    assert all(any(low <= wave <= high for low, high in BANDS) for wave in strong)
    assert np.median(throughput()) == pytest.approx(1)


def test_a_star_at_a_node_is_the_node():
    nodes = reconstruct_nodes(load_grid())
    flux = model_flux(jnp.array([[4500.0, 2.0, 0.5, 0.125]]))[0]
    node = np.asarray(nodes.norm[2, 1, 6, 1] * jnp.exp(nodes.log_continuum[2, 1, 6, 1]))
    np.testing.assert_allclose(flux, 0.5 * node / np.median(node), atol=2e-5)


def equivalent_width(T_eff, log_g, M_H):
    """Of Ca II 8542, in pixels."""
    labels = jnp.stack([label.ravel() for label in (T_eff, log_g, M_H, 0 * M_H)], axis=1)
    return np.asarray(line_features(np.asarray(model_flux(labels)), line_pixels(WAVE)))[:, 3].reshape(T_eff.shape)


@pytest.mark.slow
def test_ca_ii_falls_with_gravity_among_giants_and_rises_with_metallicity():
    T_eff, log_g, M_H = np.meshgrid((4250.0, 4750.0, 5250.0), np.linspace(1, 3, 9), -0.5, indexing="ij")
    assert (np.diff(equivalent_width(T_eff, log_g, M_H), axis=1) < 0).all()
    T_eff, log_g, M_H = np.meshgrid((4250.0, 4750.0, 5250.0), (1.5, 3.0, 4.5), np.linspace(-2, 0.5, 11), indexing="ij")
    assert (np.diff(equivalent_width(T_eff, log_g, M_H), axis=2) > 0).all()


@pytest.mark.parametrize("n_pixels", [6, 7, 4096])
def test_median_rows(n_pixels, dtype, rng):
    x = rng.uniform(size=(30, n_pixels)).astype(dtype)
    x[::3] = np.round(4 * x[::3]) / 4  # many equal values, zeros among them
    np.testing.assert_array_equal(median_rows(jnp.asarray(x)), np.median(x, axis=1))


def test_means_over_other_pixels():
    """Of Gaussian lines, whose integrals are known; the flux is conserved, whatever the pixels are."""
    centre, sigma = np.array([[7500.0], [8200.13], [8662.0]]), 8000 / 5000 / 2.3548

    def lines(low, high):
        low, high = ((edge - centre) / sigma for edge in (low, high))
        area = 0.8 * np.sqrt(np.pi / 2) * (scipy.special.erf(high / np.sqrt(2)) - scipy.special.erf(low / np.sqrt(2)))
        return 1 - area / (high - low)

    ours = lines(PIXEL_EDGES[:-1], PIXEL_EDGES[1:])
    for wave, atol in ((np.arange(7101, 8849, 0.1), 4e-3), (WAVE[:-1] + 0.2, 2e-3), (np.geomspace(7110, 8840, 900), 2e-4)):
        sides = pixel_sides(wave)
        np.testing.assert_allclose(average_pixels(ours, sides), lines(*sides), atol=atol)
    np.testing.assert_allclose(average_pixels(ours, pixel_sides(WAVE)), ours, atol=1e-10)


def test_a_survey_on_other_pixels():
    """Averages of two and four pixels beside a gap: the mean flux, and the errors of independent pixels."""
    n_joined = np.repeat([2, 4], [100, 60])
    first = np.concatenate([1000 + 2 * np.arange(100), 1600 + 4 * np.arange(60)])
    wave = np.array([WAVE[i : i + n].mean() for i, n in zip(first, n_joined, strict=True)])
    key = jax.random.key(0)
    grid, ours = simulate_survey(key, 6), simulate_survey(key, 6, wave=wave)
    flux = np.stack([np.asarray(grid.flux)[:, i : i + n].mean(axis=1) for i, n in zip(first, n_joined, strict=True)], axis=1)
    level = np.median(flux, axis=1, keepdims=True) / 0.5
    np.testing.assert_allclose(ours.flux * level, flux, atol=2e-4)
    np.testing.assert_allclose(np.median(ours.flux, axis=1), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ours.labels.mag, grid.labels.mag)
    variance = flux_error(grid.labels.mag, grid.flux / level) ** 2  # of the star as bright as on its own pixels
    expected = np.stack([variance[:, i : i + n].mean(axis=1) / n for i, n in zip(first, n_joined, strict=True)], axis=1)
    np.testing.assert_allclose(ours.error**2, expected, rtol=3e-3)
    same = simulate_survey(key, 6, wave=WAVE)
    np.testing.assert_allclose(same.flux, grid.flux, atol=1e-6)
    np.testing.assert_allclose(same.error, grid.error, rtol=1e-5)


def test_keys():
    first, again, other = (simulate_survey(jax.random.key(k), 20) for k in (0, 0, 1))
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first.flux, other.flux)


def test_bad_input():
    with pytest.raises(InputError, match="n_stars is 0"):
        simulate_survey(jax.random.key(0), 0)
    with pytest.raises(InputError, match="label_sampling is 'random'"):
        simulate_survey(jax.random.key(0), 5, label_sampling="random")
    narrow = load_grid()._replace(log_g=np.array([1.0, 2.0, 3.0, 4.0, 4.5]))
    with pytest.raises(InputError, match="log_g runs from 1 to 4.5, expected 1 to 5"):
        simulate_survey(jax.random.key(0), 5, grid=narrow)
    for wave, message in (
        ([8000.0], r"wave has shape \(1,\), expected \(P,\) with at least 2"),
        (np.ones((2, 2)), r"wave has shape \(2, 2\)"),
        ([8000.0, 7999.0], "wave has a step of -1 Angstrom, expected increasing steps of at least 0.1"),
        ([8000.0, np.nan], "wave has a step of nan"),
        ([810.00, 810.08], "wave has pixels from 809.96 to 810.12 Angstrom, expected none outside"),
        ([7100.0, 7101.0], "wave has pixels from 7099.50 to 7101.50 Angstrom, expected none outside 7100 to 8850"),
        (np.arange(710.0, 880.0), "expected none outside 7100 to 8850"),
    ):
        with pytest.raises(InputError, match=message):
            simulate_survey(jax.random.key(0), 5, wave=wave)
