"""For people who work on the kernels; not part of what is installed."""
