"""Verbs that ask a running agent."""
