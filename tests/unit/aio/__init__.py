"""Tests of nodeagent/aio."""
