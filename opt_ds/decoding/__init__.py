"""Decode untrusted files to images, waveforms and arrays, in a separate process under limits."""
