"""`nodeagent import sriov`: the verb, what it reads, and how its answer is shown and written."""
