"""Frequency and idle states of CPUs, read and set."""
