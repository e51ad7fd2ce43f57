"""Cgroups of pods: naming, reading, watching and writing them."""
