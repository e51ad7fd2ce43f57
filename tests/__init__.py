"""Tests: unit/ has the tree of the package, integration/ runs whole agents, rules/ checks all files."""
