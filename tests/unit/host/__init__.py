"""Tests of nodeagent/host."""
