"""Measures of a model on benchmarks: what it answers (`answers`), who judges it (`judge`), what the figures are.

    rewardbench     does a reward model put the better response first: MM-RLHF-RewardBench, VL-RewardBench
    hallucination   objects that are not there: CHAIR and Object HalBench, POPE, MMHal-Bench
    safety          the eleven rows of MM-RLHF's SafetyBench
    suite           the ten dimensions of MM-RLHF, by lmms-eval where it has the benchmark
    results         one JSON of figures a model, tables, two models side by side

No benchmark's data is shipped: every measure reads files of the user's, whose rows docs/evaluation.md gives.
"""
