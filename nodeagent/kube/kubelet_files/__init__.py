"""Kubelet's files and command line: its configuration, checkpoints and state."""
