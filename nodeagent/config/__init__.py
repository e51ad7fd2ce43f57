"""The configuration file: its schema, how it is loaded and what is wrong with it."""
