"""Confines containers to what they are granted."""
