"""Adapters on the disk, in PEFT's format. May import dora and below.

adapter         saves and loads the adapter of a model, and merges it in place
files           the two files of an adapter, written and checked
peft_format     the keys and the configuration that stand in them
peft_parameters the same for experts, which PEFT knows as parameters
"""
