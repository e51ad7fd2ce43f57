"""Tests of nodeagent/admin."""
