"""Runs in the guest: properties of a virtual function, through the agent's own code.

vf.py PF INTERFACE INDEX               prints what it has, as JSON
vf.py PF INTERFACE INDEX PROPERTIES    sets what this JSON says, one by one; prints errors too, by property
"""

from __future__ import annotations

import json
import sys

import msgspec

from nodeagent.core.network.vf_checks import VfPlace, said_of
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import HostError
from nodeagent.host.netlink.vf_properties import host_exchange, opened


def main(pf: str, interface: str, index: str, properties: str = "{}") -> None:
    wanted, errors = msgspec.json.decode(properties, type=VfProperties), {}
    with opened(host_exchange(), VfPlace(pf=pf, interface=interface, index=int(index))) as function:
        for which in said_of(wanted):
            try:
                function.set(wanted, which)
            except HostError as error:
                errors[str(which)] = str(error)
        print(json.dumps({"errors": errors, "has": msgspec.to_builtins(function.read())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
