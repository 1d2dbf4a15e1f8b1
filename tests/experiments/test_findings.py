"""Each claim reaches each of its verdicts from made-up tables, whose other rows say the opposite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments import findings, replicate
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE, PROTOCOLS
from moe_jax import InputError
from moe_jax.evaluate.bootstrap import resample_gain
from moe_jax.experts.cells import CELL_NAMES, N_CELLS

HOLDS, FAILS, UNKNOWN = "**holds**", "**does not hold**", "**cannot tell**"
#: Intervals of a difference, and the verdict on the claim that it is positive.
OUTCOMES = [((0.01, 0.03), HOLDS), ((-0.03, -0.01), FAILS), ((-0.01, 0.02), UNKNOWN), ((0.0, 0.01), UNKNOWN)]
outcomes = pytest.mark.parametrize(("ends", "verdict"), OUTCOMES)


def difference(low, high, **columns):
    return columns | {"delta_r2": (low + high) / 2, "low": low, "high": high}


def converge_table(low=0.01, high=0.03, best_epoch=97.0):
    """The converged linear gate in-sample has the given interval; every other row has another."""
    rows = [
        difference(0.5, 0.7, form=form, protocol=protocol, optimiser=optimiser, start=start, best_epoch=5.0)
        | {"gradient_norm": 1e-3, "validation_loss": 0.06, "r2": 0.95}
        for form in ("linear", "MLP")
        for protocol in PROTOCOLS
        for optimiser in ("Adam", "L-BFGS")
        for start in ("cold", "warm")
    ]
    table = pd.DataFrame(rows)
    linear = (table["form"] == "linear") & (table["optimiser"] == "L-BFGS") & (table["start"] == "warm")
    table.loc[linear & (table["protocol"] == IN_SAMPLE), ["delta_r2", "low", "high"]] = [(low + high) / 2, low, high]
    mlp = (table["form"] == "MLP") & (table["optimiser"] == "Adam") & (table["start"] == "cold")
    table.loc[mlp & (table["protocol"] == CROSS_FITTED), "best_epoch"] = best_epoch
    return table


def intervals_table(low=0.01, high=0.03):
    ends = {"MLP, in-sample 20 %": (low, high), "MLP, cross-fitted": (0.5, 0.7), "linear, in-sample 20 %": (-0.7, -0.5)}
    return pd.DataFrame(
        {"gate": gate, "mean": (a + b) / 2, "mean_low": a, "mean_high": b, "repetition_low": a - 0.1, "repetition_high": b + 0.1}
        for gate, (a, b) in ends.items()
    )


def rivals_table(low, high, protocol=IN_SAMPLE):
    """Leads of one protocol, of which the given one is the smallest; the other protocol says the opposite."""
    others = [name for name in CELL_NAMES if name != "Hot Metal-poor"]
    ends = {protocol: [(low, high)] + [(0.05, 0.09)] * 7, "another": [(-0.4, -0.3)] * 8}
    ends |= {p: ends["another"] for p in PROTOCOLS if p != protocol}
    return pd.DataFrame(
        {"protocol": p, "cell": cell, "lead": (a + b) / 2, "low": a, "high": b}
        for p in PROTOCOLS
        for cell, (a, b) in zip(others, ends[p], strict=True)
    )


def cells_table():
    return pd.DataFrame(
        difference(0.01 * k, 0.01 * k + 0.02, protocol=protocol, cell=cell) | {"n_test": 90, "stars_needed_in_the_cell": 1234.5}
        for protocol in PROTOCOLS
        for k, cell in enumerate(CELL_NAMES)
    )


def weights_table(mean, star):
    ends = {
        (IN_SAMPLE, "of the mean weights"): mean,
        (IN_SAMPLE, "of a star's weights, mean"): star,
        (CROSS_FITTED, "of the mean weights"): (-9.0, -8.0),
        (CROSS_FITTED, "of a star's weights, mean"): (-9.0, 8.0),
    }
    return pd.DataFrame(
        {"protocol": p, "entropy": entropy, "difference": (low + high) / 2, "low": low, "high": high}
        for (p, entropy), (low, high) in ends.items()
    )


def scale_table(low, high):
    ends = {("MLP", 1.0, 32_000): (low, high), ("MLP", 1.0, 100_000): (0.5, 0.7), ("MLP", 1.0, 4_000): (-0.9, -0.8)}
    ends |= {("MLP", 0.2, 32_000): (-0.3, -0.2), ("linear", 1.0, 32_000): (0.2, 0.3), ("linear", 1.0, 200_000): (0.2, 0.3)}
    return pd.DataFrame(
        {"method": method, "noise_level": noise, "n_train": n, "delta_r2": (a + b) / 2, "delta_r2_low": a, "delta_r2_high": b}
        for (method, noise, n), (a, b) in ends.items()
    )


@outcomes
def test_mlp_beats_classification(ends, verdict):
    claim = findings.mlp_beats_classification(intervals_table(*ends))
    assert claim.verdict == verdict
    assert claim.our_result.startswith(f"{sum(ends) / 2:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}] in the report's protocol, +0.6000 [")


@outcomes
def test_linear_is_worse(ends, verdict):
    """The claim is of a negative difference, so that a gain of the linear gate refutes it."""
    low, high = ends
    claim = findings.linear_is_worse(converge_table(-high, -low))
    assert claim.verdict == verdict
    assert claim.our_result.startswith(f"{-sum(ends) / 2:+.4f} [{-high:+.4f}, {-low:+.4f}] in the report's protocol")


@outcomes
def test_hot_metal_poor_gain_most(ends, verdict):
    claim = findings.hot_metal_poor_gain_most(cells_table(), rivals_table(*ends))
    assert claim.verdict == verdict
    assert "+0.0700 [+0.0600, +0.0800] in the report's protocol; Hot Metal-rich gains +0.0900" in claim.our_result
    assert f"over Cool Metal-poor, is {sum(ends) / 2:+.4f}" in claim.our_result


def test_one_cell_with_a_larger_gain_refutes_the_third_claim_whatever_the_others_say():
    rivals = rivals_table(-0.03, -0.01)
    rivals.loc[1, ["low", "high"]] = [-0.01, 0.2]
    assert findings.hot_metal_poor_gain_most(cells_table(), rivals).verdict == FAILS


@pytest.mark.parametrize(("mean", "of_mean"), OUTCOMES)
@pytest.mark.parametrize(("star", "of_star"), OUTCOMES)
def test_weights_are_more_uniform(mean, of_mean, star, of_star):
    claim = findings.weights_are_more_uniform(weights_table(mean, star))
    assert claim.verdict == f"{of_mean} of the mean weights, {of_star} star by star"


@outcomes
def test_soft_beats_hard(ends, verdict):
    claim = findings.soft_beats_hard({"estimate": 0.0, "low": ends[0], "high": ends[1], "stars": 1234.5})
    assert claim.verdict == verdict + " (about 1,234 test stars would be needed)" * (verdict == UNKNOWN)


@outcomes
def test_gain_survives_noise(ends, verdict):
    claim = findings.gain_survives_noise(scale_table(*ends))
    assert claim.verdict == verdict
    assert claim.our_result.endswith("+0.6000 [+0.5000, +0.7000] with 100,000")


@pytest.mark.parametrize(("best_epoch", "verdict"), [(100.0, FAILS), (91.0, FAILS), (90.0, HOLDS), (40.0, HOLDS)])
def test_mlp_converges(best_epoch, verdict):
    claim = findings.mlp_converges(converge_table(best_epoch=best_epoch))
    assert claim.verdict == verdict
    assert claim.our_result.startswith(f"best epoch {best_epoch:.0f} of 100")


@pytest.fixture
def results(tmp_path):
    """Made-up results of all experiments, in which a network on features and expert predictions beats the mixture."""
    seen = {"protocol": CROSS_FITTED, "stars": "all", "baseline_protocol": IN_SAMPLE, "baseline_stars": "all"}
    both = "features + expert predictions"
    controls = [
        ("MLP gate", both, 0.0),
        ("MLP", both, 0.1),
        ("MLP", "features", -0.1),
        ("constant weights", "expert predictions", -0.2),
    ]
    changes = [("features", "no PCA", 0.6), ("hidden units", "8", 0.7), ("hidden units", "256", 0.9), ("gate stars", "9", 0.95)]
    sources = {"test stars": 0.5, "survey": 0.2, "noise draw": -0.1, "gate seed": 0.1, "noise x test": 0.2}
    tables = {
        "converge_gate/variants": converge_table(),
        "measure_leakage/differences": pd.DataFrame(difference(0.1, 0.2, form=form) | seen for form in ("MLP", "linear")),
        "replicate/intervals": intervals_table(),
        "replicate/components": pd.DataFrame(
            {"gate": "MLP, in-sample 20 %", "source": source, "share": max(share, 0), "variance": 1e-4 * share}
            for source, share in sources.items()
        ),
        "calibrate_bootstrap/ranking": pd.DataFrame({"method": ["bca", "percentile"], "rms_error_by_cell": [1.0, 2.0]}),
        "calibrate_bootstrap/coverage": pd.DataFrame(
            {"method": ["bca", "percentile"] * 2, "level": 0.95, "stars": ["all stars"] * 2 + ["a cell"] * 2}
        ).assign(coverage=[0.951, 0.931, 0.1, 0.1]),
        "control_gate/variants": pd.DataFrame(
            difference(d - 0.01, d + 0.01, form=form, inputs=inputs) | {"r2": 0.8 + d} for form, inputs, d in controls
        ),
        "ablate_gate/variants": pd.DataFrame(
            difference(r2 - 0.81, r2 - 0.79, changed=changed, value=value) | {"variant": f"{value} {changed}", "r2": r2}
            for changed, value, r2 in changes
        ),
        "train_jointly/variants": pd.DataFrame(difference(0.1, 0.2, variant=v) | {"r2": 0.9} for v in ("first", "last")),
        "cover_all/variants": pd.DataFrame(difference(0.1, 0.2, variant=v) | {"r2": r2} for v, r2 in (("a", 0.9), ("b", 0.8))),
        "scale/scale": scale_table(0.01, 0.03),
    }
    for name, table in tables.items():
        experiment, file = name.split("/")
        folder = tmp_path / experiment / "default"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{file}.csv", index=False)
    (tmp_path / "replicate" / "default" / "run.json").write_text(json.dumps({"stars_in_a_test_set": 832}))
    return tmp_path


def test_the_whole_page(results):
    hard = {"estimate": 0.02, "low": 0.01, "high": 0.03, "stars": 10.0}
    evidence = findings.Evidence(cells_table(), rivals_table(-0.01, 0.03), weights_table((0.1, 0.2), (-0.2, -0.1)), hard, 8_322)
    text = findings.write_findings(findings.FindingsConfig(results_dir=results), evidence, "python -m experiments.findings")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[0][2] for row in rows] == list("1234567")
    assert [row[3] for row in rows] == [
        HOLDS,
        FAILS,
        UNKNOWN,
        f"{HOLDS} of the mean weights, {FAILS} star by star",
        HOLDS,
        HOLDS,
        FAILS,
    ]
    for sentence in (
        "first minus the second: MLP +0.1500 [+0.1000, +0.2000]",
        "**Mixing is not the best use of the experts.**",
        "(R2 0.9000 against 0.8000). From the 13 features alone it reaches 0.7000; constant weights reach 0.6000",
        "Without the principal components: -0.2000 [-0.2100, -0.1900]. The best width is 256 hidden units",
        "(last)",
        "together: a, R2 0.9000",
        "test stars 50%, survey 20%, noise draw 0%, gate seed 10%; the rest are interactions",
        "hold the truth 93.1% of the time where they promise 95 %. The bca intervals come closest (95.1%)",
        "| in-sample | Cool Metal-poor | 90 | +0.0100 [+0.0000, +0.0200] | 1,234 |",
    ):
        assert sentence in text
    # Components below 0 count as 0: (1.96 + 0.84)^2 x 832 x 0.7e-4 / 0.02^2.
    assert "takes 1,143 test stars: on these spectra the report's 816 were too few" in text
    assert "nan" not in text


def test_the_leads_are_differences_of_the_cells(rng):
    y, gain = jnp.asarray(rng.normal(size=900)), jnp.asarray(rng.normal(size=900))
    resampled = resample_gain(jax.random.key(0), y, gain, jnp.arange(900) % N_CELLS, 50, N_CELLS).columns(slice(1, None))
    table = findings.lead(resampled)
    assert table["cell"].tolist() == [name for name in CELL_NAMES if name != "Hot Metal-poor"]
    gains = np.array([gain[k::9].mean() / np.var(y[k::9]) for k in range(9)])
    np.testing.assert_allclose(table["lead"], gains[6] - np.delete(gains, 6), rtol=1e-4)
    np.testing.assert_allclose((table["low"] + table["high"]) / 2, table["lead"], rtol=1e-4, atol=1e-5)


def test_the_gates_of_the_replication_have_the_names_that_are_looked_up():
    gates = replicate.gates_of(replicate.PRESETS["default"])
    for protocol, name in findings.REPLICATED.items():
        assert (gates[name].protocol, gates[name].fraction) == (protocol, findings.FRACTIONS[protocol])


def test_other_results_are_needed(tmp_path):
    with pytest.raises(InputError, match=r"variants.csv: found no such file, expected the result of `python -m experiments\."):
        findings.read(findings.FindingsConfig(results_dir=tmp_path), "converge_gate", "variants")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "MLP", "colour": "red"}, "variants.csv: found no column colour, expected it: run the experiment again"),
        ({"form": "MLP", "optimiser": "Adam"}, "variants.csv: found 4 rows with form MLP, optimiser Adam, expected one"),
        ({"form": "tree"}, "variants.csv: found 0 rows with form tree, expected one"),
    ],
)
def test_a_row_that_is_not_there(results, values, message):
    table = findings.read(findings.FindingsConfig(results_dir=results), "converge_gate", "variants")
    with pytest.raises(InputError, match=message):
        findings.row_of(table, **values)
