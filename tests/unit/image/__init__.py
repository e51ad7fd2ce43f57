"""Tests of packaging/image."""
