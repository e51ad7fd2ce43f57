"""Tests of nodeagent/nri."""
