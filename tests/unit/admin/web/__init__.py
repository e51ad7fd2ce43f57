"""Tests of nodeagent/admin/web."""
