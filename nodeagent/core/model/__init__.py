"""Frozen values that all layers share. Nothing here makes decisions."""
