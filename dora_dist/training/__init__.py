"""A training run. May import models and below.

run               a run from its settings to its adapter
loop              the loop over optimizer steps, and what is due between them
trainer           a step, an evaluation, samples
objectives        what is minimised: the losses of tokens, of labels, of rewards
preference        DPO and its relatives
optim             the optimizer, its schedule, and the model that it trains
checkpoint        the state of a run, written from shards and read into them, whatever the strategy
resume            which checkpoint a run goes on from: whole, of this run, and what may have changed since
health            signals, losses that are not finite, slow ranks
run_log           metrics, messages and the progress bar
"""
