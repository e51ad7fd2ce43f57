"""`nodeagent import nvidia`: the verb, what it reads, and how its answer is shown and written."""
