"""Tests of nodeagent/kube."""
