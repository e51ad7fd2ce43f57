"""Keeps containers that hold exclusive CPUs at the utilization clamps that their claims or classes ask for."""
