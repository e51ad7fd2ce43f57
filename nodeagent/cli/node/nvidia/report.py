"""The answer of `nodeagent import nvidia`: what becomes of each value, what is written, and the next steps."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.node.nvidia.sources import Taken
from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.output import forms
from nodeagent.cli.shared.tables import print_table
from nodeagent.config.load import parse
from nodeagent.core.imports.findings import INCOMPLETE, Finding
from nodeagent.errors import InputError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.sysfs import atomic_file
from nodeagent.resources.offer import offers

CONFIG, CLASSES = "config.yaml", "classes.yaml"


class Report(msgspec.Struct, frozen=True):
    """One run. folder: where it is written, or None for a dry run."""

    taken: Taken
    folder: Path | None

    @property
    def incomplete(self) -> list[Finding]:
        """Return what an admin has to look at."""
        return [one for one in self.taken.findings if one.said.state in INCOMPLETE]

    def files(self) -> dict[str, str]:
        """Return the texts that are written, by the names of their files. Raise ConfigError if the agent would not
        take its configuration."""
        found = {}
        if self.taken.config:
            found[CONFIG] = self._configuration()
            offers(parse(found[CONFIG], source=CONFIG), load_kinds())
        if self.taken.objects:
            found[CLASSES] = _yaml_of(self.taken.objects)
        for file, objects in self.taken.manifests.items():
            name = "claims.yaml" if file == "-" else Path(file).name
            if name in found:
                raise InputError(f"cannot write {file}: there is another {name}")
            found[name] = _yaml_of(objects)
        return found

    def write(self) -> None:
        """Write the files into the folder. Raise InputError if one of them is there already, HostError if it cannot be
        written."""
        if self.folder is None:
            return
        files = {self.folder / name: text for name, text in self.files().items()}
        if there := sorted(str(path) for path in files if path.exists()):
            raise InputError(f"cannot write {', '.join(there)}: it is there already")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make --out {self.folder}: {error.strerror}") from None
        for path, text in files.items():
            atomic_file.replace(path, text.encode())

    def show(self, args: argparse.Namespace) -> None:
        """Print the answer in the form that was asked for."""
        files = self.files()
        document = {
            "complete": not self.incomplete,
            "entries": [_row(one) for one in self.taken.findings],
            "configuration": self.taken.config,
            "objects": self.taken.objects,
            "manifests": self.taken.manifests,
            "written": [str(self.folder / name) for name in files] if self.folder is not None else [],
            "next": self.next(),
        }
        forms.write(args, document, lambda shown: self._print(shown["entries"], files, whole=args.no_trunc))

    def _print(self, rows: Iterable[Mapping[str, str]], files: Mapping[str, str], *, whole: bool) -> None:
        cells = [(row["state"], row["place"], row["value"], row["to"], row["why"]) for row in rows]
        print_table(("STATE", "PLACE", "VALUE", "TO", "WHY"), cells, whole=whole)
        for name, text in files.items() if self.folder is None else ():
            print(f"\n# {name}\n{text}", end="")
        print()
        for step in self.next():
            print(f"next: {step}")

    def next(self) -> list[str]:
        """Return the next steps, in order."""
        steps = []
        if self.incomplete:
            steps.append(f"read why {len(self.incomplete)} values are not, or not wholly, in what is written")
        if self.folder is None:
            return [*steps, "run it again with --out DIR"]
        if self.taken.config:
            steps += [
                f"nodeagent config check {self.folder / CONFIG} --here",
                f"make it {DEFAULT_CONFIG}, or add its keys there: with `resources`, only what is listed is served",
                "remove NVIDIA's program from the node, then start the agent or reload its configuration: pods that "
                "run keep what they have",
            ]
        objects = [name for name in self.files() if name != CONFIG]
        return [*steps, *(f"kubectl apply -f {self.folder / name}" for name in objects)]

    def _configuration(self) -> str:
        notes = (f"{one.said.state}: {one.place} {one.value}: {one.said.why}" for one in self.incomplete)
        return "".join(f"# {' '.join(one.split())}\n" for one in notes) + _yaml_of([self.taken.config])


def _row(one: Finding) -> dict[str, str]:
    return {
        "state": one.said.state.value,
        "place": one.place,
        "value": one.value,
        "to": one.said.to,
        "why": one.said.why,
    }


def _yaml_of(documents: Iterable[Any]) -> str:
    import yaml

    return yaml.dump_all(
        documents, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True, width=110
    )
