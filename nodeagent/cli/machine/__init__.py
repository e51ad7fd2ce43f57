"""Verbs about the machine and where a request fits on it."""
