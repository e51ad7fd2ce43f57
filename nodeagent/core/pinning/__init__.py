"""Derives the desired state of each cgroup from the ledger and the containers."""
