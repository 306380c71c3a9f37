"""The block's forward and backward: Triton kernels, each with its plan, and PyTorch's products."""
