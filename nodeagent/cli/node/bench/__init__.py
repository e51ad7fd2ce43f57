"""`nodeagent bench`: what a placement is worth on this machine, measured."""
