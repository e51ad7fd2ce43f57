"""Where things are on a node, unless the configuration or an option says otherwise."""

from __future__ import annotations

from pathlib import Path

DEFAULT_CONFIG = Path("/etc/nodeagent/config.yaml")
STATE_DIR = "/var/lib/nodeagent"
