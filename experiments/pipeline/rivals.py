"""Rivals of the mixtures that other modules do not have: The Cannon, a convolutional network, experts and gate by gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray
from moe_jax.experts.cells import N_CELLS
from moe_jax.experts.ridge import Ridge, predict_ridge
from moe_jax.gates import GateConfig, MLPGate, route_soft
from moe_jax.gates.controls import fit_regressor
from moe_jax.gates.optimize import Params, Rows

_BLOCK = 256  # pixels that are fitted at a time
_ROUNDS = 5  # of the scatter: it has then settled to a few per cent
_STEPS = 40  # of a star's fit
_KERNELS, _CHANNELS = (16, 4, 4), 32  # of the convolutions
_CONV_EPOCHS = 40  # at most
_NODES = np.array([-0.75, -0.25, 0.25, 0.75])  # of each label, from which a star's fit may start


class Cannon(NamedTuple):
    """The Cannon (Ness et al. 2015): the flux of each pixel is quadratic in the labels, with a scatter of its own."""

    low: Float[np.ndarray, " L"]  #: least value of each label among the training stars, -1 on the scale of the model
    high: Float[np.ndarray, " L"]  #: largest value, 1 on the scale of the model
    coef: Float[np.ndarray, "M P"]
    scatter: Float[np.ndarray, " P"]  #: standard deviation of the flux about the model beside the noise


def quadratic_terms(x: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "N M"]:
    """1, the labels, and all their products of two."""
    first, second = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones_like(x[:, :1]), x, x[:, first] * x[:, second]], axis=1)


def _slopes(x: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "N L M"]:
    """Derivatives of ``quadratic_terms`` in the labels."""
    first, second = np.triu_indices(x.shape[1])
    linear = np.eye(x.shape[1])
    products = linear[:, first] * x[:, None, second] + x[:, None, first] * linear[:, second]
    return np.concatenate([np.zeros_like(x)[:, :, None], np.broadcast_to(linear, (len(x), *linear.shape)), products], axis=2)


def fit_cannon(labels: Float[AnyArray, "N L"], flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"]) -> Cannon:
    """The coefficients and the scatter s of each pixel that make its flux likeliest, with errors sqrt(error^2 + s^2).

    Least squares with weights w = 1 / (error^2 + s^2) and steps of Fisher scoring for s^2 follow each other: with the residuals r,
    s^2 rises by sum w^2 (r^2 - 1 / w) / sum w^2.
    """
    labels, flux, error = map(np.asarray, (labels, flux, error))
    low, high = labels.min(axis=0), labels.max(axis=0)
    terms = quadratic_terms((2 * (labels - low) / (high - low) - 1).astype(np.float64)).astype(flux.dtype)
    n_terms = terms.shape[1]
    first, second = np.triu_indices(n_terms)
    products = (terms[:, first] * terms[:, second]).T
    coef, scatter = np.empty((n_terms, flux.shape[1])), np.empty(flux.shape[1])
    for start in range(0, flux.shape[1], _BLOCK):
        pixels = slice(start, start + _BLOCK)
        y, noise = flux[:, pixels], error[:, pixels] ** 2
        s2 = noise.mean(axis=0)
        for _ in range(_ROUNDS):
            w = 1 / (noise + s2[None, :])
            gram = np.empty((y.shape[1], n_terms, n_terms))
            gram[:, first, second] = gram[:, second, first] = (products @ w).T
            solution = np.linalg.solve(gram, (terms.T @ (w * y)).T[:, :, None].astype(np.float64))[:, :, 0]
            excess = (y - terms @ solution.T.astype(flux.dtype)) ** 2 - noise - s2[None, :]
            s2 = np.maximum(s2 + np.sum(w**2 * excess, axis=0) / np.sum(w**2, axis=0), 0)
        coef[:, pixels], scatter[pixels] = solution.T, np.sqrt(s2)
    return Cannon(low, high, coef, scatter)


def predict_cannon(cannon: Cannon, flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"]) -> Float[np.ndarray, "N L"]:
    """The likeliest labels of each star within the range of the training stars, by damped Gauss-Newton steps from the best node.

    The model is linear in M terms, so that a star's chi^2 is v' A v - 2 b' v for its terms v: pixels are summed once.
    """
    flux, error = map(np.asarray, (flux, error))
    n_labels, n_terms = len(cannon.low), len(cannon.coef)
    first, second = np.triu_indices(n_terms)
    weight = 1 / (error.astype(np.float64) ** 2 + cannon.scatter[None, :] ** 2)
    a = np.empty((len(flux), n_terms, n_terms))
    a[:, first, second] = a[:, second, first] = weight @ (cannon.coef[first] * cannon.coef[second]).T
    b = (weight * flux) @ cannon.coef.T

    def chi2(terms: np.ndarray) -> np.ndarray:
        of_stars: np.ndarray = np.einsum("nm,nmk,nk->n", terms, a, terms) - 2 * np.sum(b * terms, axis=1)
        return of_stars

    nodes = np.stack(np.meshgrid(*[_NODES] * n_labels), axis=-1).reshape(-1, n_labels)
    v = quadratic_terms(nodes)
    of_nodes = a[:, first, second] @ (v[:, first] * v[:, second] * np.where(first == second, 1, 2)).T - 2 * b @ v.T
    x, damping = nodes[np.argmin(of_nodes, axis=1)], np.full(len(flux), 1e-3)
    least = chi2(quadratic_terms(x))
    for _ in range(_STEPS):
        slopes = _slopes(x)
        half = slopes @ a
        gradient = np.einsum("nlm,nm->nl", slopes, b) - np.einsum("nlm,nm->nl", half, quadratic_terms(x))
        hessian = half @ slopes.swapaxes(1, 2)
        # A label at an end of its range that would leave it stays where it is.
        free = ~((x >= 1) & (gradient > 0)) & ~((x <= -1) & (gradient < 0))
        hessian *= free[:, :, None] & free[:, None, :]
        diagonal = np.einsum("nll->nl", hessian)
        diagonal *= 1 + damping[:, None]
        diagonal += np.where(free & (diagonal > 0), 0, 1)
        step = np.linalg.solve(hessian, (gradient * free)[:, :, None])[:, :, 0]
        tried = np.clip(x + step, -1, 1)
        new = chi2(quadratic_terms(tried))
        better = new < least
        x, least = np.where(better[:, None], tried, x), np.where(better, new, least)
        damping = np.clip(np.where(better, damping / 10, damping * 10), 1e-8, 1e8)
    return cannon.low + (x + 1) / 2 * (cannon.high - cannon.low)


@jax.tree_util.register_static
@dataclass(frozen=True)
class ConvNet(MLPGate):
    """Three convolutions along the pixels, a hidden layer and a linear layer; the last column is no pixel and joins the hidden.

    A kernel is as wide as its stride, so that a convolution is a matrix product, which a CPU does much faster.
    """

    def build(self, n_features: int, n_experts: int, rngs: Any) -> Any:
        """The ``nnx.Module`` that maps (N, F) columns to (N, K) outputs."""
        from flax import nnx

        n_pixels, whole = n_features - 1, int(np.prod(_KERNELS))
        length, hidden = -(-n_pixels // whole), self.hidden

        class Network(nnx.Module):
            def __init__(self) -> None:
                channels = (1, *[_CHANNELS] * len(_KERNELS))
                self.convolutions = nnx.List(
                    nnx.Linear(k * c, _CHANNELS, rngs=rngs) for k, c in zip(_KERNELS, channels, strict=False)
                )
                self.hidden = nnx.Linear(length * _CHANNELS + 1, hidden, rngs=rngs)
                self.head = nnx.Linear(hidden, n_experts, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                z = jnp.pad(x[:, :-1], ((0, 0), (0, length * whole - n_pixels)))
                for convolution in self.convolutions:
                    z = nnx.relu(convolution(z.reshape(len(z), -1, convolution.in_features)))
                z = jnp.concatenate([z.reshape(len(z), -1), x[:, -1:]], axis=1)
                return self.head(nnx.relu(self.hidden(z)))

        return Network()


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("predict",))
@dataclass(frozen=True)
class PredictionError:
    """Squared error of each star's prediction."""

    predict: Callable[[Params, jax.Array], jax.Array]  #: from params and (N, F) columns to (N,)

    def __call__(self, params: Params, rows: Rows) -> jax.Array:
        """(N,) losses."""
        x, y = rows
        return (y - self.predict(params, x)) ** 2


Predictor = Callable[[AnyArray], jax.Array]
"""A fitted method: from (N, F) columns to (N,) predictions."""


def fit_conv(
    key: PRNGKeyArray, x: Float[AnyArray, "N F"], y: Float[AnyArray, " N"], network: ConvNet, config: GateConfig
) -> Predictor:
    """Regresses y on pixels and one more column."""
    key_init, key_train = jax.random.split(key)
    start = network.init(key_init, x.shape[1], 1)
    return _fit(key_train, lambda params, x: network.logits(params, x)[:, 0], start, x, y, config)


def fit_joint(
    key: PRNGKeyArray, x: Float[AnyArray, "N F"], y: Float[AnyArray, " N"], n_experts: int, gate: MLPGate, config: GateConfig
) -> Predictor:
    """Trains linear experts and their gate together, from random params."""

    def mix(params: Params, x: jax.Array) -> jax.Array:
        of_gate = {name: leaf for name, leaf in params.items() if name != "experts"}
        return route_soft(gate.apply(of_gate, x), predict_ridge(Ridge(**params["experts"]), x))

    key_gate, key_experts, key_train = jax.random.split(key, 3)
    coef = jax.random.normal(key_experts, (n_experts, x.shape[1]), jnp.asarray(y).dtype) / x.shape[1] ** 0.5
    start = gate.init(key_gate, x.shape[1], n_experts) | {"experts": {"coef": coef, "intercept": coef[:, 0]}}
    return _fit(key_train, mix, start, x, y, config)


def _fit(
    key: PRNGKeyArray, predict: Any, start: Params, x: Float[AnyArray, "N F"], y: Float[AnyArray, " N"], config: GateConfig
) -> Predictor:
    """Fits on standardised x and y by Adam, until stars that are held out are predicted no better."""
    model, _ = fit_regressor(key, PredictionError(predict), start, x, jnp.asarray(y), config)
    return lambda x: model.predict(predict, x)


def rival_methods(
    key: PRNGKeyArray, train: Any, labels: Float[AnyArray, "N L"], columns: Callable[[Any], AnyArray], config: GateConfig
) -> dict[str, Callable[[], Callable[[Any], Any]]]:
    """Each rival's name, and how it is fitted to spectra ``train``; the second of the labels is log g.

    ``columns`` gives from spectra (N, F) components and, last, the logarithm of the noise.
    """
    y = jnp.asarray(np.asarray(labels)[:, 1], train.flux.dtype)
    short = dataclasses.replace(config, epochs=min(config.epochs, _CONV_EPOCHS), patience=10)

    def pixels(stars: Any) -> jax.Array:
        return jnp.concatenate([stars.flux, columns(stars)[:, -1:]], axis=1)

    def cannon() -> Callable[[Any], Any]:
        fitted = fit_cannon(labels, train.flux, train.error)
        return lambda stars: predict_cannon(fitted, stars.flux, stars.error)[:, 1]

    def conv() -> Callable[[Any], Any]:
        predict = fit_conv(key, pixels(train), y, ConvNet(), short)
        return lambda stars: predict(pixels(stars))

    def joint() -> Callable[[Any], Any]:
        predict = fit_joint(key, columns(train), y, N_CELLS, MLPGate(), config)
        return lambda stars: predict(columns(stars))

    return {
        "The Cannon (quadratic)": cannon,
        "convolutional network on pixels and noise": conv,
        "nine experts and gate by gradient, on weighted components and noise": joint,
    }
