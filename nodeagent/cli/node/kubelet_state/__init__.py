"""`nodeagent import kubelet-state`: the verb, and how its plan is shown."""
