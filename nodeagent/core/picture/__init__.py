"""The picture of a machine: which part of it is held by whom, as `nodeagent map` and the web page draw it."""
