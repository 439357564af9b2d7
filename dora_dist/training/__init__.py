"""A training run. May import models and below.

run               a run from its settings to its adapter
loop              the loop over optimizer steps, and what is due between them
trainer           a step, an evaluation, samples
optim             the optimizer, its schedule, and the model that it trains
checkpoint        the state of a run, written from shards and read into them, whatever the strategy
checkpoint_files  checkpoints on the disk: which are whole, which one a run goes on from
resume_rules      which run a checkpoint belongs to, and what may have changed since
health            signals, losses that are not finite, slow ranks
run_log           metrics, messages and the progress bar
"""
