"""`nodeagent replay`: another verb on a captured node."""
