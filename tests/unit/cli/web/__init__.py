"""Tests of nodeagent/cli/web."""
