"""The networks of the gates as Flax NNX modules: from features to the logits of the weights."""

from __future__ import annotations

import functools

import jax
from flax import nnx

# Uniform in +-1 / sqrt(fan-in), as in PyTorch, where the experiment was first done.
_UNIFORM = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
_linear = functools.partial(nnx.Linear, precision="highest", kernel_init=_UNIFORM)


class Network(nnx.Module):
    """A linear layer, behind a hidden layer of rectified units if there are hidden units."""

    def __init__(self, n_features: int, n_experts: int, n_hidden: int, rngs: nnx.Rngs) -> None:
        if n_hidden:
            self.hidden = _linear(n_features, n_hidden, rngs=rngs)
        self.head = _linear(n_hidden or n_features, n_experts, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(features)) if hasattr(self, "hidden") else features)
