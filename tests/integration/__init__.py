"""Whole agents, as processes."""
