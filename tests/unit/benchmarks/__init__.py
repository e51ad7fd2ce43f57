"""Tests of what measures a real machine."""
