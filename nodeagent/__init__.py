"""One daemon per Kubernetes node: it knows the machine and decides who gets which part of it."""

from nodeagent.version import VERSION

__version__ = VERSION
