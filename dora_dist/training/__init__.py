"""A training run. May import models and below.

run             a run from its settings to its adapter
trainer         the loop over optimizer steps
optim           the optimizer, its schedule, and the model that it trains
checkpoint      the state of a run on the disk, whatever the strategy
resume_rules    which run a checkpoint belongs to, and what may have changed since
health          signals, losses that are not finite, slow ranks
run_log         metrics, messages and the progress bar
"""
