"""Threads of the host and interrupts on exclusive CPUs."""
