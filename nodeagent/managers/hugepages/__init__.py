"""Keeps hugepage pools at the required size."""
