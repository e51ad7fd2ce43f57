"""Accelerators other than GPUs, one file a kind."""
