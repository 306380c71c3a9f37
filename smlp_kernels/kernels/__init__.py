"""The Triton kernels, each with its plan, and the backward, which has PyTorch's products too."""
