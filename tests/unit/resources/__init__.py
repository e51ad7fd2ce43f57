"""Tests of nodeagent/resources."""
