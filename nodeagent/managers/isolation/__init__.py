"""Watches exclusive CPUs for threads and interrupts of others."""
