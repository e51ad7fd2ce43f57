"""Reading and writing files of the machine."""
