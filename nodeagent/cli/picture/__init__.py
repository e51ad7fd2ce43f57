"""Drawings of a picture: text for terminals and files, and SVG."""
