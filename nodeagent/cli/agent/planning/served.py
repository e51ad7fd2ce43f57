"""What the agent serves on the node, from its configuration file and its status page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.config.load import load
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import ALL_FEATURES, FEATURES, Features
from nodeagent.errors import ConfigError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.resources.catalog import THROUGH_DRA, Dra, dra_of
from nodeagent.resources.offer import Offer, offers

NODE = "node"
"""Stands for the node's name where the agent does not show one."""


class Served(msgspec.Struct, frozen=True):
    """What is served through both APIs."""

    offers: tuple[Offer, ...]
    """Through the device plugin."""
    dra: Dra
    features: Features
    """The fields of ResourceSlices that the API server keeps, as far as it is known."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the agent's configuration."""
    parser.add_argument("--config", metavar="FILE", help=f"the agent's configuration (default: {DEFAULT_CONFIG})")


def served(facts: Facts, state: NodeState, named: str | None) -> Served:
    """Return what the agent serves.

    named: the option --config; without it, the configuration is that of the running agent. Raise ConfigError if the
    configuration cannot be read, or is not the one that the agent has in force.
    """
    file, families = _file(facts, state, named), load_kinds()
    config = _config(file)
    refused, dra = frozenset(state.status["refused"]), state.status["dra"] or {}
    every = offers(config, families)
    mine = tuple(one for one in every if one.by_device_plugin and refused.isdisjoint((one.name, one.config.name)))
    by_claims = {one.removesuffix(THROUGH_DRA) for one in refused if one.endswith(THROUGH_DRA)}
    found = Served(
        offers=mine,
        dra=dra_of(config, families, dra.get("node") or config.dra.node_name or NODE, {*refused, *by_claims}),
        features=_features(dra.get("slices")),
    )
    _compare(found, state.status, str(file or "the built-in configuration"))
    return found


def _file(facts: Facts, state: NodeState, named: str | None) -> Path | None:
    """Return the configuration's file, or None for the defaults. A capture has its own, and an older agent does not say
    where its configuration is."""
    shown = state.status.get("config_file")
    if named or facts.scanned is not None or shown is None:
        return facts.config_file
    return Path(shown) if shown else None


def _config(file: Path | None) -> Config:
    if file is None:
        return Config()
    try:
        return load(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; --config names the agent's configuration") from None


def _compare(found: Served, status: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if the agent serves other resources than a configuration says. Of DRA the agent shows the kinds
    that it has published, and nothing if it serves none."""
    mine, agents = {one.name for one in found.offers}, {one["name"] for one in status["resources"]}
    if mine != agents:
        raise _other(source, "through the device plugin", mine, agents)
    published = ((status["dra"] or {}).get("slices") or {}).get("pools") or ()
    kinds, agents = {*found.dra.catalog.kinds}, {str(one["name"]).rpartition("/")[2] for one in published}
    if agents - kinds or (kinds and not status["dra"]):
        raise _other(source, "through DRA", kinds, agents)


def _other(source: str, how: str, mine: Set[str], agents: Set[str]) -> ConfigError:
    names = [", ".join(sorted(some)) or "nothing" for some in (mine, agents)]
    return ConfigError(
        f"{source} is not the configuration that the agent has in force: {how} it serves {names[0]}, the agent "
        f"{names[1]}; --config names the agent's configuration"
    )


def _features(slices: Any) -> Features:
    """Return all features but those that the API server is known not to keep."""
    lost = [name for name in FEATURES if slices and name in slices.get("lost", ())]
    return replace(ALL_FEATURES, **dict.fromkeys(lost, False))
