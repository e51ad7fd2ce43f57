"""Completion in the shell: one completer, which the scripts of three shells ask."""
