"""Data pipeline from feature stores to packed batches.

Its stages are the step plan (`plan`), masking (`masking`), packing (`batch`) and prefetching (`loader`).
"""
