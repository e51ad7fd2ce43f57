"""Hugepage pools: read, resized, and who uses them."""
