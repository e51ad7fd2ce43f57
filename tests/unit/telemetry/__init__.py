"""Tests of nodeagent/telemetry."""
