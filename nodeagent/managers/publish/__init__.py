"""Keeps objects of the API server that describe the machine up to date."""
