"""Frozen values that every layer speaks in. Nothing here decides anything."""
