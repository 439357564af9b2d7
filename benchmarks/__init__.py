"""What was measured and how, one module a claim. From the repository's root: `python -m benchmarks.step.layer`.

    common/    results, models, contenders, timing, collectives, plotting: what the others share
    step/      one device: a step, a layer, the norms, memory
    scaling/   tokens per second over the number of ranks
    planning/  what is counted and predicted, against what is measured
    report.py  writes the tables and figures of README and docs/ from results/
    gpu.py     what `make gpu` runs, a plain script

A module writes its record under its own name into results/<device>.json.
"""
