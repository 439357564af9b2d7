"""Frozen weights in 4 bits. Knows nothing of DoRA. May import data and below; it needs parallel's shards.

nf4                         the layout by rows, to 4 bits and back; PackedMatrix, which others read by rows
kernels, triton_kernels     the way back in one pass on a GPU, and how Triton's programs are launched
modules                     modules that hold a frozen weight, dense or in 4 bits
bitsandbytes_files          4-bit weights as bitsandbytes saves them
"""
