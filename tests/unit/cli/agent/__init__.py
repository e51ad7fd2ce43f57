"""Tests of nodeagent/cli/agent."""
