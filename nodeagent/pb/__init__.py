"""Generated from protos/ by protos/generate.py. Never edited; a test keeps it fresh."""
