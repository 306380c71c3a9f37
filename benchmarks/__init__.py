"""Benchmarks of the sMLP block: shapes, floor arithmetic, providers, timings and reports."""
