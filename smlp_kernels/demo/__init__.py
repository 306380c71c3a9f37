"""The fused block in a real training: ``python -m smlp_kernels.demo --out demo_out``.

Trains a small SparseMLP on 5,000 real MNIST images twice from the same seed, once with the
reference blocks and once with the fused ones swapped in, swaps the trained models both ways, checks
the kernels against float64 PyTorch, and writes curves, a table and a picture of the receptive
field. Needs the ``demo`` extra; runs on a GPU and, with the kernels in Triton's interpreter for the
check alone, on a CPU.
"""
