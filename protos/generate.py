"""Compiles our .proto files into nodeagent/pb: `python protos/generate.py [FOLDER]`.

Every file in protos/nodeagent/pb gives NAME_pb2.py and NAME_pb2.pyi below FOLDER/nodeagent/pb, and, where it is spoken
over gRPC, NAME_pb2_grpc.py in FOLDER/tests/pb: the product serves from the descriptors, and the peers that tests play
use grpcio. FOLDER is the checkout unless told otherwise. Needs grpcio-tools. The result is committed;
a test keeps it fresh.
"""

from __future__ import annotations

import re
import sys
from keyword import kwlist
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
OVER_TTRPC = ("nri", "ttrpc")
_KEYWORD_LINE = re.compile(rf"^ *(?:{'|'.join(kwlist)}): .*\n", re.MULTILINE)


def generate(target: Path) -> None:
    """Write the modules below `target`; RuntimeError where the compiler refuses a source."""
    sources = sorted((PROTOS / "nodeagent" / "pb").glob("*.proto"))
    _compile(target, sources, "python", "pyi")
    _compile(target, [one for one in sources if one.stem not in OVER_TTRPC], "grpc_python")
    (target / "tests" / "pb").mkdir(parents=True, exist_ok=True)
    for peer in (target / "nodeagent" / "pb").glob("*_pb2_grpc.py"):
        peer.replace(target / "tests" / "pb" / peer.name)
    for stub in (target / "nodeagent" / "pb").glob("*_pb2.pyi"):
        # An enum value called None is reached by getattr only; a stub that names it is no Python.
        stub.write_text(_KEYWORD_LINE.sub("", stub.read_text()))


def _compile(target: Path, sources: list[Path], *kinds: str) -> None:
    outputs = [f"--{kind}_out={target}" for kind in kinds]
    if protoc.main(["protoc", f"-I{PROTOS}", *outputs, *map(str, sources)]) != 0:
        raise RuntimeError(f"cannot compile {', '.join(map(str, sources))}: see the compiler's messages above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
