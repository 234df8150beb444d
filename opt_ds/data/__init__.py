"""From feature stores to packed batches: `plan` decides, `masking` corrupts, `batch` packs, `loader` does it ahead of time."""
