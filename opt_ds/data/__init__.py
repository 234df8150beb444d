"""Data pipeline from feature stores to packed batches: step plan (`plan`), masking, packing (`batch`), prefetching
(`loader`).
"""
