"""The generated code is what our .proto files give, and those say what the protocols' tables say."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool

from tests.conftest import shared_path
from tests.support.paths import CHECKOUT, DATA

ROOT = CHECKOUT
PROTOS = ROOT / "protos"
NAMES = sorted(path.stem for path in (PROTOS / "nodeagent" / "pb").glob("*.proto"))
TITLES = {
    "deviceplugin": "Device plugin v1beta1",
    "dra_v1": "DRA v1",
    "dra_v1beta1": "DRA v1beta1",
    "drahealth_v1": "DRA health v1",
    "drahealth_v1alpha1": "DRA health v1alpha1",
    "nri": "NRI v1alpha1 (over ttrpc)",
    "pluginregistration": "Plugin registration v1",
    "podresources": "Pod resources v1",
}
_BRACKETS = re.compile(r"(\S+) \(([^)]*)\)")
_VERSION_LINE = re.compile(r"Protobuf Python Version: (.*)|GRPC_GENERATED_VERSION = '(.*)'")

pytestmark = pytest.mark.skipif(not NAMES, reason="no .proto files: not a checkout")


def module(name: str) -> Any:
    return importlib.import_module(f"nodeagent.pb.{name}_pb2")


def generated(root: Path) -> dict[str, str]:
    found = sorted([*(root / "nodeagent" / "pb").glob("*_pb2*.py*"), *(root / "tests" / "pb").glob("*_pb2*.py*")])
    return {str(path.relative_to(root)): path.read_text() for path in found if path.suffix in (".py", ".pyi")}


def test_the_committed_modules_describe_the_sources(tmp_path: Path) -> None:
    """Whatever the compiler's version: same messages, numbers, types, services."""
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    sources = [str(PROTOS / "nodeagent" / "pb" / f"{name}.proto") for name in NAMES]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--descriptor_set_out={tmp_path / 'all'}"]
    subprocess.run([*command, *sources], check=True, timeout=60)
    pool = DescriptorPool()
    for source in descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "all").read_bytes()).file:
        pool.Add(source)
        assert described(module(Path(source.name).stem).DESCRIPTOR) == described(pool.FindFileByName(source.name))


def test_the_committed_text_is_what_the_generator_writes(tmp_path: Path) -> None:
    """Letter for letter, where the compiler is the one that wrote it."""
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    subprocess.run([sys.executable, str(PROTOS / "generate.py"), str(tmp_path)], check=True, timeout=60)
    fresh = generated(tmp_path)
    committed = generated(ROOT)
    versions = {
        text: set(_VERSION_LINE.findall("".join(files.values())))
        for text, files in (("committed", committed), ("here", fresh))
    }
    if versions["committed"] != versions["here"]:
        pytest.skip(f"another compiler wrote the committed code: {versions}")
    assert committed.keys() == fresh.keys()
    assert [name for name in fresh if fresh[name] != committed[name]] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_call_and_field_is_in_the_protocol_s_table(name: str) -> None:
    """Both ways: nothing missing, nothing of our own."""
    assert sorted(described(module(name).DESCRIPTOR)) == protocols()[name]


def protocols() -> dict[str, list[str]]:
    """Calls, messages with the numbers of their fields, and enumerations of each protocol."""
    found: dict[str, list[str]] = json.loads((DATA / "protocols.json").read_bytes())
    return found


def test_the_tables_are_those_of_the_notes_that_they_were_made_from() -> None:
    text = shared_path("wire.md").read_text()
    assert protocols() == {name: sorted(noted(text, name)) for name in NAMES}


def noted(text: str, name: str) -> list[str]:
    if name == "ttrpc":
        return noted_of_ttrpc(text)
    section = re.search(rf"^## {re.escape(TITLES[name])}$.*?```\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    return section[1].strip().splitlines()


def noted_of_ttrpc(text: str) -> list[str]:
    """These have no table: a message stands in a line, with those that it alone uses in brackets after the field."""
    noted = dict(re.findall(r"^- (Request|Response): (.*)\.$", text, re.MULTILINE))
    inner = {name.split(".")[-1]: fields for line in noted.values() for name, fields in _BRACKETS.findall(line)}
    outer = {name: _BRACKETS.sub(lambda found: found[1].split(".")[-1], line) for name, line in noted.items()}
    expected = [f"{name}: {fields}" for name, fields in outer.items()]
    expected += [f"{name.removesuffix('[]')}: {fields.replace(', ', '; ')}" for name, fields in inner.items()]
    return [*expected, "Any: 1 type_url string; 2 value bytes"]


def test_every_protocol_has_its_table() -> None:
    """A new .proto file is checked too, or this fails."""
    assert sorted(protocols()) == NAMES == sorted([*TITLES, "ttrpc"])


def test_all_modules_live_together() -> None:
    """Packages of one name (podresources and drahealth_v1 are both `v1`) have no message in common."""
    found = [one.full_name for name in NAMES for one in module(name).DESCRIPTOR.message_types_by_name.values()]
    assert len(set(found)) == len(found) > 0


def described(file: FileDescriptor) -> list[str]:
    """A file in the table's own notation."""
    calls = [call(one) for service in file.services_by_name.values() for one in service.methods]
    messages = [message(one) for one in file.message_types_by_name.values()]
    enums = [enum(one) for one in file.enum_types_by_name.values()]
    inner = [enum(one) for above in file.message_types_by_name.values() for one in above.enum_types]
    return calls + messages + enums + inner


def call(method: MethodDescriptor) -> str:
    stream = "stream " if method.server_streaming else ""
    path = f"/{method.containing_service.full_name}/{method.name}"
    return f"rpc {path}: {method.input_type.name} -> {stream}{method.output_type.name}"


def message(one: Any) -> str:
    fields = "; ".join(f"{field.number} {field.name} {kind(field)}" for field in one.fields)
    return f"{one.name}: {fields or '(empty)'}"


def enum(one: Any) -> str:
    name = one.full_name.removeprefix(f"{one.file.package}.")
    return f"enum {name}: {', '.join(f'{value.name}={value.number}' for value in one.values)}"


def kind(field: Any) -> str:
    names = {field.TYPE_STRING: "string", field.TYPE_BOOL: "bool", field.TYPE_INT64: "int64"}
    names |= {field.TYPE_INT32: "int32", field.TYPE_UINT64: "uint64"}
    names |= {field.TYPE_UINT32: "uint32", field.TYPE_BYTES: "bytes"}
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (kind(one) for one in field.message_type.fields)
        return f"map<{key},{value}>"
    named = field.message_type or field.enum_type
    base = named.name if named is not None else names[field.type]
    optional = "optional " if field.containing_oneof is not None else ""
    return f"{optional}{base}{'[]' if field.is_repeated else ''}"
