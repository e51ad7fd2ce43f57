"""Keeps cache ways and memory bandwidth as claims and classes ask for them."""
