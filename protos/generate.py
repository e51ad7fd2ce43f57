"""Compiles our .proto files into nodeagent/pb: `python protos/generate.py [FOLDER]`.

Every file in protos/nodeagent/pb gives NAME_pb2.py, NAME_pb2.pyi and NAME_pb2_grpc.py below FOLDER/nodeagent/pb;
FOLDER is the checkout unless told otherwise. Needs grpcio-tools. The result is committed; a test keeps it fresh.
"""

from __future__ import annotations

import re
import sys
from keyword import kwlist
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
_KEYWORD_LINE = re.compile(rf"^ *(?:{'|'.join(kwlist)}): .*\n", re.MULTILINE)


def generate(target: Path) -> None:
    """Write the modules below `target`; RuntimeError where the compiler refuses a source."""
    sources = [str(path) for path in sorted((PROTOS / "nodeagent" / "pb").glob("*.proto"))]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{PROTOS}", *outputs, *sources]) != 0:
        raise RuntimeError(f"cannot compile {', '.join(sources)}: see the compiler's messages above")
    for stub in (target / "nodeagent" / "pb").glob("*_pb2.pyi"):
        # An enum value called None is reached by getattr only; a stub that names it is no Python.
        stub.write_text(_KEYWORD_LINE.sub("", stub.read_text()))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
