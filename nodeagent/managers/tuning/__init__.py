"""Keeps exclusive CPUs at the frequency and latency that are configured for them."""
