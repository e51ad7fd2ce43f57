"""Tests of nodeagent/config."""
