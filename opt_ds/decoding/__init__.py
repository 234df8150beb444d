"""Untrusted files -> images, waveforms and arrays, in a process of their own, under limits."""
