"""Tests of nodeagent/state."""
