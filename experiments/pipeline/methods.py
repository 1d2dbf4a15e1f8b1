"""The methods that are compared, and the pairs in which they are compared."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float

from moe_jax.core.arrays import AnyArray


class Method(NamedTuple):
    """A way to predict, with the protocol by which its gate was trained."""

    name: str
    protocol: str = ""  #: "in-sample", "cross-fitted", or empty for methods without a regression gate

    @property
    def column(self) -> str:
        """Name of the method's column in tables."""
        return "_".join(filter(None, (self.name, self.protocol.replace("-", "_"))))

    @property
    def title(self) -> str:
        """Name in reports."""
        return f"{self.name} ({self.protocol})" if self.protocol else self.name


class Pair(NamedTuple):
    """Two methods that are compared."""

    method: Method
    baseline: Method

    @property
    def title(self) -> str:
        """Name in reports."""
        if self.method.name == self.baseline.name:
            return f"{self.method.name}: {self.method.protocol} - {self.baseline.protocol}"
        protocol = self.method.protocol or self.baseline.protocol
        return Method(f"{self.method.name} - {self.baseline.name}", protocol).title


GLOBAL, ORACLE, CLASSIFY, HARD, FALLBACK = map(Method, ("global", "oracle", "classify", "hard", "fallback"))

IN_SAMPLE, CROSS_FITTED = PROTOCOLS = ("in-sample", "cross-fitted")

REGRESSION_GATES = tuple(Method(name, protocol) for protocol in PROTOCOLS for name in ("regress_mlp", "regress_linear"))

METHODS = (GLOBAL, ORACLE, CLASSIFY, HARD, FALLBACK, *REGRESSION_GATES)

PAIRS = (
    *(Pair(method, CLASSIFY) for method in REGRESSION_GATES),
    *(Pair(method, CLASSIFY) for method in (GLOBAL, ORACLE, HARD, FALLBACK)),
    *(Pair(Method("regress_mlp", protocol), Method("regress_linear", protocol)) for protocol in PROTOCOLS),
    *(Pair(Method(name, PROTOCOLS[1]), Method(name, PROTOCOLS[0])) for name in ("regress_mlp", "regress_linear")),
)

Predictions = dict[Method, Float[AnyArray, " N"]]
