"""Tests of nodeagent/managers."""
