"""Utilization clamps: what claims and classes ask for, and how cgroup v2 has it."""
