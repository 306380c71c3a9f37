"""The Triton kernels: ``mix`` (forward and input gradient) and ``weight_grad``."""
