"""Runs the compiled kernels without a GPU: an executor of PTX, and the block's kernels on it.

README.md says what is executed, what is checked and what stays unseen.
"""
