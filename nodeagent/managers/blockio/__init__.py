"""Keeps limits of disk I/O as claims and classes ask for them."""
