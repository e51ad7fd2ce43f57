"""`nodeagent capture`: one node in one file."""
