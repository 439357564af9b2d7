"""What a run will hold and how long it takes, before it is started. May import training and below.

plan                        the verb: memory, time, and what to change; what `train` asks first
rehearse, stand_ins         the run's own code on fake tensors; all that stands there for something else
fake_group                  a process group whose other ranks are absent
trace                       what code holds, computes and sends
cost, hardware              how long that takes, on which GPUs and links
known_models                shapes of well-known models, where the hub is not at hand
"""
