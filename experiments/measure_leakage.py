"""What does it cost to train a gate on stars that its experts have seen? Four protocols, the same test stars.

    python -m experiments.measure_leakage                  4 seeds of each; about 6 min on 2 cores
    python -m experiments.measure_leakage --preset smoke   small; about a minute

Results go to results/measure_leakage/PRESET.
"""

from __future__ import annotations

import dataclasses

import pandas as pd

from experiments.pipeline.config import QUICK, GateStudyConfig
from experiments.pipeline.gates import CONVERGED_LINEAR, GateRun, mix_by_class, run_gates
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE, PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.report.markdown import intervals, table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import run_command
from experiments.runner.stages import Stages

PRESETS = {"default": GateStudyConfig(), "smoke": GateStudyConfig(**QUICK)}
FRACTIONS = {"20 %": 0.2, "all": 1.0}
COMPARED = (
    ((IN_SAMPLE, "all"), (IN_SAMPLE, "20 %")),
    ((CROSS_FITTED, "20 %"), (IN_SAMPLE, "20 %")),
    ((CROSS_FITTED, "all"), (IN_SAMPLE, "all")),
    ((CROSS_FITTED, "all"), (CROSS_FITTED, "20 %")),
    ((CROSS_FITTED, "all"), (IN_SAMPLE, "20 %")),
)


def compute(config: GateStudyConfig, stages: Stages) -> Results:
    """Trains all gates."""
    prepared = prepare(config.data, stages, config.output.cache)
    kinds = {"MLP": GateRun(config.mlp, config.gate, n_seeds=config.n_seeds), "linear, converged": CONVERGED_LINEAR}
    runs = {
        (kind, protocol, part): dataclasses.replace(run, protocol=protocol, fraction=fraction)
        for kind, run in kinds.items()
        for protocol in PROTOCOLS
        for part, fraction in FRACTIONS.items()
    }
    trained, test = stages.each("gates", runs.items()), prepared.test.covered()
    predictions = {key: run_gates(config.data, prepared, run, config.output.cache).predictions for key, run in trained}
    named = {f"{kind}: {protocol} {part}": value for (kind, protocol, part), value in predictions.items()}
    table = compare_by(config, test.log_g, named, mix_by_class(prepared, test))
    table[["form", "protocol", "stars"]] = [(kind.split(",")[0], protocol, part) for kind, protocol, part in runs]
    pairs = []
    for kind in kinds:
        for better, worse in COMPARED:
            ours, theirs = predictions[kind, *better], predictions[kind, *worse]
            row = compare_by(config, test.log_g, {" ".join(better): ours}, theirs).iloc[0]
            names = (kind, f"{' '.join(better)} - {' '.join(worse)}")
            pairs.append((*names, *row[["delta_r2", "low", "high"]], kind.split(",")[0], *better, *worse))
    columns = ["gate", "difference", "delta_r2", "low", "high", "form", "protocol", "stars", "baseline_protocol", "baseline_stars"]
    differences = pd.DataFrame(pairs, columns=columns)
    shown = differences[["gate", "difference"]].assign(**{"delta R2": intervals(differences)})
    return variants_results(
        "Leakage, measured",
        config.bootstrap,
        table,
        setup=f"Gates trained on 20 % or on all of {prepared.n_covered:,} covered training stars, with expert predictions that are "
        f"in-sample (the experts had seen the stars) or cross-fitted (a star's own expert had not); the 20 % are the same stars. "
        f"{len(test.log_g):,} covered test stars.",
        against="the classification gate",
        groups=[kind for kind, _, _ in runs],
        sections=["## Differences between protocols", table_markdown(shown)],
        tables={"differences": differences},
    )


main = Study("measure_leakage", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
