"""What a run will hold and how long it takes, before it is started. May import training and below.

plan, fits                  the verb: memory, time, and what to change; what `train` asks first
rehearse, stand_ins         the run's own code on fake tensors; what stands there for files, rows and the watchdog
fake_group                  a process group whose other ranks are absent
replacements, patches       all that a rehearsal replaces; that each is there, and called
trace                       what code holds, computes and sends
cost, hardware              how long that takes, on which GPUs and links
known_models                shapes of well-known models, where the hub is not at hand
forked                      a function in a copy of this process
"""
