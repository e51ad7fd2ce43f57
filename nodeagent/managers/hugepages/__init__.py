"""Keeps hugepage pools as large as they have to be."""
