"""Tests of nodeagent/cli/picture."""
