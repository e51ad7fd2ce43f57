"""Keeps the inventory up to date."""
