"""Kubelet's own CPU and memory managers: what they assigned, and what can be imported."""
