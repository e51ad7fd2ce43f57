"""Utilization clamps in cgroups' cpu.uclamp files."""
