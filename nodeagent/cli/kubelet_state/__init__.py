"""`nodeagent import kubelet-state`: the verb and its report."""
