"""Which happenings on a node are reported to Kubernetes as Events, and in what words."""
