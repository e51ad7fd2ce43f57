"""What the command line says about itself: help, examples, exit codes, environment, suggestions."""
