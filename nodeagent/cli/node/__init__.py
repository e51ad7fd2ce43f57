"""Verbs for the one who installs, configures and repairs the agent of a node."""
