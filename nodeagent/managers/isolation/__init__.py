"""Watches exclusive CPUs for threads and interrupts that do not belong there."""
