"""Reads and writes the machine; returns core values."""
