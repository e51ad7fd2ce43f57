"""Tests of nodeagent/core."""
