"""transformers' models: how a run's is made, what of it is replaced, and merging. May import adapters and below.

huggingface                 config.json to a model on the meta device, checked; loading as transformers does
files, origins, scaled      weight files; which parts of them the model's tensors are; FP8 and MXFP4
weights                     files to this rank's parts
build                       the one order in which a run's model is made
head_loss, attention        the loss without all logits; packed documents without a mask
participation               which layers the loss of text depends on
coverage                    which share of the weights is adapted
quantize                    linear layers to 4 bits
quantized                   a 4-bit model for others' loops
merge                       the verb: adapter and base as one model
merge_weights               tensor by tensor
merged                      the same of a live model, for inference engines
"""
