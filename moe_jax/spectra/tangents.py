"""Tangent vectors of spectra: the change of the flux along a nuisance, to first order in its size.

Simard, Victorri, LeCun & Denker (1992, NIPS 4, 895) train a model so that it does not change along such vectors;
``moe_jax.experts.ridge`` does so in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError, to_device
from moe_jax.core.convert import convert_arguments
from moe_jax.spectra.label_model import LIGHT_SPEED


@convert_arguments("wave", "flux", finite=("wave", "flux"))
def tangent_vectors(
    wave: Float[AnyArray, " P"],
    flux: Float[AnyArray, "N P"],
    *,
    velocity: float = 0.0,
    broadening: float = 0.0,
    continuum: float | Sequence[float] = (),
    constant: float = 0.0,
) -> Float[AnyArray, "N T P"]:
    """Tangents of spectra, each times the size of its nuisance; those of size 0 are left out.

    The order is that of the arguments. A size is the standard deviation of a nuisance of mean 0. Derivatives are those of a cubic
    spline in ln wavelength. They make noise larger, so give flux without it: simulated, or rebuilt from a few principal components.

    Args:
        wave: wavelengths of at least 4 pixels, positive and increasing.
        flux: spectra.
        velocity: v in km/s, of either sign: (v / c) dF / d ln wave.
        broadening: b in km/s, the standard deviation of a Gaussian in ln wavelength: (b / c)^2 / 2 d^2F / (d ln wave)^2.
        continuum: relative sizes of the Legendre polynomials of degree 1, 2, ... over the pixels' range, which multiply the flux;
            a number is that of degree 1.
        constant: a constant that is added to the flux, as a part of the spectrum's median.

    Returns:
        T tangents of each spectrum, for ``fit_ridge`` and ``fit_weighted_ridge``.

    Raises:
        InputError: shapes that disagree, wavelengths that do not increase, or no size that is positive.
    """
    if len(wave) < 4 or not (np.diff(wave, prepend=0) > 0).all():
        raise InputError(f"wave holds {len(wave)} numbers, expected at least 4, positive, increasing")
    slopes = np.atleast_1d(continuum).tolist()
    sizes = [velocity, broadening, *slopes, constant]
    if not all(0 <= size < np.inf for size in sizes) or not any(sizes):
        raise InputError(f"sizes are {sizes}, expected finite numbers of at least 0, and one above 0")
    wave, spectra = np.asarray(wave, np.float64), np.asarray(flux, np.float64)
    log_wave, position = np.log(wave), 2 * (wave - wave[0]) / (wave[-1] - wave[0]) - 1
    tangents = []
    if velocity or broadening:
        spline = scipy.interpolate.make_interp_spline(log_wave, spectra, axis=1)
        scales = (velocity / LIGHT_SPEED, 0.5 * (broadening / LIGHT_SPEED) ** 2)
        tangents += [scale * spline(log_wave, order) for order, scale in enumerate(scales, 1) if scale]
    for degree, size in enumerate(slopes, 1):
        if size:
            tangents.append(size * scipy.special.eval_legendre(degree, position)[None, :] * spectra)
    if constant:
        tangents.append(np.broadcast_to(constant * np.median(spectra, axis=1)[:, None], spectra.shape))
    return to_device(np.stack(tangents, axis=1, dtype=flux.dtype, casting="same_kind"))
