"""Hugepage pools: reading and resizing them, and who uses them."""
