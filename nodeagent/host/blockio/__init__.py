"""Disks as the kernel limits I/O on them, and the cgroup files that say so."""
