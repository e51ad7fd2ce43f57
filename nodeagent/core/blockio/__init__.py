"""Limits of disk I/O: what claims and classes ask for, and the lines of cgroup v2 that say so."""
