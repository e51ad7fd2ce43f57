"""Tests of nodeagent/cli."""
