"""DoRA itself: the mathematics, its kernels, the layers and how they get into a model. May import quant and below.

norm_math                   norms by tiles, the ratio m/n, merging: plain functions on tensors
products, functional        mixed-precision products; a layer's forward and backward
kept_output                 what the backward reads of an output that a model may write into
kernels, triton_kernels     the same, fused, on a GPU
layers                      DoraLayer, and DoraLinear and DoraEmbedding made from it
grouped_kernels             all experts of a mixture at once, on a GPU (triton_grouped)
grouped, experts            the same for every expert of a mixture; how a module of experts computes by them
experts_layout              how models hold their experts, and the proof of it
targets, linear_subclasses  which modules of a model become them
inject                      how they do
base_alone                  the base out of an adapted model, for a while
norm_cache                  norms, computed once per optimizer step from each rank's own rows
merged                      merged weights out of them
"""
