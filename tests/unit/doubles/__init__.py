"""Tests of nodeagent/doubles."""
