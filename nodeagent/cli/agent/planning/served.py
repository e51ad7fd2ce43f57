"""What the agent serves on the node, from its configuration file and its status page."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.config.load import load
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import ALL_FEATURES, FEATURES, Features
from nodeagent.errors import ConfigError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.resources.catalog import Dra, dra_of
from nodeagent.resources.offer import Offer, offers

NODE = "node"
"""Stands for the node's name where the agent does not show one."""


@dataclass(frozen=True, slots=True)
class Served:
    """What is served through both APIs."""

    offers: tuple[Offer, ...]
    """Through the device plugin."""
    dra: Dra
    features: Features
    """The fields of ResourceSlices that the API server keeps, as far as it is known."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the agent's configuration."""
    parser.add_argument("--config", metavar="FILE", help=f"the agent's configuration (default: {DEFAULT_CONFIG})")


def served(facts: Facts, state: NodeState) -> Served:
    """Return what the agent serves. Raise ConfigError if its configuration cannot be read."""
    config, families = _config(facts), load_kinds()
    refused, dra = frozenset(state.status["refused"]), state.status["dra"] or {}
    every = offers(config, families)
    mine = (one for one in every if one.by_device_plugin and refused.isdisjoint((one.name, one.config.name)))
    return Served(
        offers=tuple(mine),
        dra=dra_of(config, families, dra.get("node") or config.dra.node_name or NODE, refused),
        features=_features(dra.get("slices")),
    )


def _config(facts: Facts) -> Config:
    if facts.config_file is None:
        return Config()
    try:
        return load(facts.config_file)
    except ConfigError as error:
        raise ConfigError(f"{error}; --config names the agent's configuration") from None


def _features(slices: Any) -> Features:
    """Return all features but those that the API server is known not to keep."""
    lost = [name for name in FEATURES if slices and name in slices.get("lost", ())]
    return replace(ALL_FEATURES, **dict.fromkeys(lost, False))
