"""rvspecfit (Koposov et al. 2011, ApJ 736, 146), a peer of ``fit_labels``: our grid as its library, and its fit of stars.

rvspecfit prepares templates by commands. ``rvs_make_interpol`` wants a resolution below that of the library, and of the kernel
between the two it sums five standard deviations only. So it cannot keep a resolution: from 5,000 to 4,999 that kernel is far
narrower than a pixel, and the flux errs by a tenth. What this command writes is therefore written here. The steps after it
(``rvs_make_nd``, ``rvs_make_ccf``) and both fits are rvspecfit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy

from moe_jax.spectra.grid import load_grid
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.simulate import unscaled_flux

NODES, SPLINES = "nodes", "splines"  #: rvspecfit interpolates linearly between the nodes, or calls ``SplineTemplate``
NAMES = ("teff", "logg", "feh", "alpha")
_LOG_WAVE = np.geomspace(WAVE[0], WAVE[-1], 4608)  # no step is wider than a pixel
_N_NORM, _N_CONTINUUM = 160, 6  # components, as many as ``fit_labels`` takes


class SplineTemplate:
    """The grid, interpolated by its cubic splines, in float64: rvspecfit takes differences over tiny steps."""

    def __init__(self, saved: Mapping[str, Any]) -> None:
        grid = load_grid()
        self.axes = [np.asarray(axis, np.float64) for axis in grid[:4]]
        self.splines = [scipy.interpolate.CubicSpline(axis, np.eye(len(axis))) for axis in self.axes]
        self.coef = np.concatenate([grid.norm_coef[..., :_N_NORM], grid.continuum_coef[..., :_N_CONTINUUM]], axis=-1).astype(float)
        rows = (grid.norm_mean[None], grid.norm_basis[:_N_NORM], grid.continuum_mean[None], grid.continuum_basis[:_N_CONTINUUM])
        self.basis = scipy.interpolate.CubicSpline(WAVE, np.vstack(rows).astype(np.float64), axis=1)(saved["lam"])

    def __call__(self, point: np.ndarray) -> np.ndarray:
        """The flux at log10 T_eff, log g, [M/H], [alpha/M]; beyond the grid that of its edge."""
        coef: Any = self.coef
        for spline, axis, label in zip(self.splines, self.axes, (10 ** point[0], *point[1:]), strict=True):
            coef = np.tensordot(spline(np.clip(label, axis[0], axis[-1])), coef, axes=1)
        norm, log_continuum = (np.insert(part, 0, 1.0) for part in np.split(coef, [_N_NORM]))
        flux: np.ndarray = (norm @ self.basis[: len(norm)]) * np.exp(log_continuum @ self.basis[len(norm) :])
        return flux


class Outside:
    """How far labels lie outside the grid, in units of its ranges."""

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.low, self.high = np.array([(axis[0], axis[-1]) for axis in load_grid()[:4]], np.float64).T

    def __call__(self, point: np.ndarray) -> float:
        labels = np.array([10 ** point[0], *point[1:]])
        beyond = np.maximum(np.maximum(self.low - labels, labels - self.high), 0)
        return float(np.linalg.norm(beyond / (self.high - self.low)))


def write_library(folder: Path, max_velocity: float, every: int = 3) -> Mapping[str, Any]:
    """Writes the grid as rvspecfit's templates; returns its configuration, where all but the velocities (km/s) is its default.

    One node in ``every`` is a template of the cross-correlation, which starts the fits.
    """
    from rvspecfit import make_ccf, make_nd, serializer, utils

    grid = load_grid()
    nodes = np.stack(np.meshgrid(*grid[:4], indexing="ij")).reshape(4, -1).astype(np.float64)
    flux = np.asarray(unscaled_flux(grid, jnp.asarray(nodes.T, jnp.float32)), np.float64)
    specs = scipy.interpolate.CubicSpline(WAVE, flux, axis=1)(_LOG_WAVE)
    specs = np.log(specs / np.median(specs, axis=1, keepdims=True))
    shared = {"lam": _LOG_WAVE, "parnames": NAMES, "log_step": True, "mapper_args": ((0,),)}  # the logarithm of T_eff
    shared |= {"mapper_module": "rvspecfit.read_grid", "mapper_class_name": "LogParamMapper"}
    arrays = {"specs": specs.astype(np.float32), "vec": nodes, "lognorms": np.zeros(len(specs)), "log_spec": True}
    serializer.save_dict_to_hdf5(str(folder / f"specs_{NODES}.h5"), shared | arrays)
    make_nd.execute(NODES, prefix=str(folder))
    ours = {"interpolation_type": "generic", "module": __name__, "class_name": "SplineTemplate", "outside_class_name": "Outside"}
    serializer.save_dict_to_hdf5(str(folder / f"interp_{SPLINES}.h5"), shared | ours)
    correlation = make_ccf.get_ccf_config(logl0=np.log(WAVE[0]), logl1=np.log(WAVE[-1]), npoints=len(WAVE))
    make_ccf.ccf_executor(NODES, correlation, str(folder), str(folder), every, nthreads=1)
    limits = {"min_vel": -max_velocity, "max_vel": max_velocity, "template_lib": f"{folder}/"}
    frozen: Mapping[str, Any] = utils.freezeDict(utils.get_default_config() | limits)
    return frozen


def fit_star(setup: str, star: tuple[np.ndarray, np.ndarray, np.ndarray], n_terms: int, config: Any) -> np.ndarray:
    """Labels and velocity, their five standard deviations, and 1 where all is well; NaN and 0 where rvspecfit raises.

    ``setup`` is ``NODES`` or ``SPLINES``, ``star`` has vacuum wavelengths (Angstrom), flux and its error.
    """
    from rvspecfit import fitter_ccf, spec_fit, vel_fit

    try:
        start = fitter_ccf.fit(spec_fit.SpecData(NODES, *star), config)["best_par"]
        fit = vel_fit.process(spec_fit.SpecData(setup, *star), start, options={"npoly": n_terms}, config=config)
    except (AssertionError, RuntimeError, ValueError):
        return np.array([np.nan] * 10 + [0.0])
    numbers = [*(fit["param"][n] for n in NAMES), fit["vel"], *(fit["param_err"][n] for n in NAMES), fit["vel_err"]]
    well = fit["minimize_success"] and not fit["bad_hessian"] and np.isfinite(numbers).all()
    return np.array([*numbers, float(well)])


def chi2_of(estimate: np.ndarray, star: tuple[np.ndarray, np.ndarray, np.ndarray], n_terms: int, config: Any) -> float:
    """chi2 of labels and velocity (5,) as rvspecfit computes it with the grid's splines; the continuum is free."""
    from rvspecfit import spec_fit

    data = [spec_fit.SpecData(SPLINES, *star)]
    options = {"options": {"npoly": n_terms}, "config": config, "full_output": True}
    return float(spec_fit.get_chisq(data, estimate[4], tuple(estimate[:4]), **options)["chisq_array"][0])
