"""A picture as SVG, for tickets and documents: one file without anything from elsewhere, readable on light and dark
backgrounds, with the name of each part for a pointer and a screen reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from nodeagent.cli.picture.colours import colour_of
from nodeagent.cli.picture.lines import Item, plain, printable, text_of, words, wrapped
from nodeagent.cli.picture.text import device_label, holdings, node_title, package_title, part_mark, summary_parts
from nodeagent.core.picture.values import (
    EXCLUDED,
    FREE,
    OUTSIDE,
    RESERVED,
    PartState,
    Picture,
    PictureCore,
    PictureDevice,
    PictureGroup,
    PictureNode,
)

WIDTH, MARGIN, INDENT = 920, 16, 12
PITCH, LARGE_PITCH, GROUP_GAP = 13, 20, 7
"""From one cell to the next; CPUs are drawn larger where all of a NUMA node still fit side by side."""
LINE, CHARACTER = 16, 6.7
"""Height of a line of text, and the width of a character, in pixels of an 11 pixel monospace font."""
_FILLS = {FREE: "f", RESERVED: "r", OUTSIDE: "o", EXCLUDED: "b"}
_STYLE = """
text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:var(--ink)}
.h{font-weight:bold}.c{fill:#111;font-size:9px;text-anchor:middle}.q{fill:var(--dim)}
svg{--ink:#1f2328;--dim:#59636e;--page:#fff;--box:#f3f5f7;--line:#c8ced5;--free:#dfe4ea;color-scheme:light dark}
.page{fill:var(--page)}.box{fill:var(--box);stroke:var(--line)}.f{fill:var(--free)}.r{fill:var(--dim)}
.o,.b{fill:var(--free);stroke:var(--dim);stroke-dasharray:2 2}.ill{stroke:#d1242f;stroke-width:2.5}
@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--dim:#9198a1;--page:#0d1117;--box:#161b22;--line:#3d444d;--free:#2f3742}}
"""


def svg_of(picture: Picture) -> str:
    """Return a picture as a whole SVG document."""
    drawing = _Drawing(picture)
    drawing.draw()
    height = drawing.y + MARGIN
    summary = f"{sum(1 for _ in picture.cpus())} CPUs: {', '.join(summary_parts(picture))}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-labelledby="title summary">\n<title id="title">Who holds which part of this machine</title>\n'
        f'<desc id="summary">{escape(summary)}</desc>\n<style>{_STYLE}</style>\n'
    )
    page = f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>\n'
    return f"{head}{page}{''.join(drawing.parts)}</svg>\n"


class _Drawing:
    """The elements of a drawing, made from top to bottom."""

    def __init__(self, picture: Picture) -> None:
        self.parts: list[str] = []
        self.y = MARGIN
        """Where the next part starts."""
        self._picture = picture
        widest = max(
            (len(node.groups) + sum(len(group.cores) for group in node.groups) for node in picture.nodes()), default=0
        )
        self._pitch = LARGE_PITCH if widest * LARGE_PITCH <= WIDTH - 2 * (MARGIN + INDENT) else PITCH

    def draw(self) -> None:
        for package in self._picture.packages:
            if package.packages:
                self._lines(words(package_title(package)), MARGIN, style="h")
            for node in package.nodes:
                self._node(node)
        self._legend()

    # ---------------------------------------------------------------- the machine

    def _node(self, node: PictureNode) -> None:
        top, at = self.y, len(self.parts)
        self.y += 4
        self._lines(words(node_title(node)), MARGIN + INDENT)
        self._groups(node.groups)
        for kind, devices in _by_kind(node.devices):
            self._devices(kind, devices)
        self.y += 6
        size = f'x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{self.y - top}"'
        self.parts.insert(at, f'<rect class="box" {size} rx="6"/>\n')
        self.y += 8

    def _groups(self, groups: Sequence[PictureGroup]) -> None:
        """Draw groups of cores side by side as far as they fit."""
        left = MARGIN + INDENT
        x, rows = left, 0
        for group in groups:
            most = (WIDTH - 2 * (MARGIN + INDENT)) // self._pitch
            for start in range(0, len(group.cores), most):
                cores = group.cores[start : start + most]
                if x > left and x + len(cores) * self._pitch > WIDTH - MARGIN - INDENT:
                    self.y += rows * self._pitch + 4
                    x, rows = left, 0
                self._cores(cores, x)
                x += len(cores) * self._pitch + GROUP_GAP
                rows = max(rows, *(len(core.cpus) for core in cores))
        self.y += rows * self._pitch + 4

    def _cores(self, cores: Sequence[PictureCore], x: int) -> None:
        for column, core in enumerate(cores):
            for row, cpu in enumerate(core.cpus):
                where = x + column * self._pitch, self.y + row * self._pitch
                self._cell(where, cpu.state, cpu.holders, f"CPU {cpu.id}", pitch=self._pitch)

    def _devices(self, kind: str, devices: Sequence[PictureDevice]) -> None:
        """Draw the devices of one kind, each a cell; few of them with their names."""
        left = MARGIN + INDENT
        self._text(left, self.y + 10, kind, "q")
        x = start = left + round((len(kind) + 1) * CHARACTER)
        for device in devices:
            label = device_label(device) if len(devices) <= 8 else ""
            width = PITCH + round((len(label) + 2) * CHARACTER) * bool(label)
            if x > start and x + width > WIDTH - MARGIN - INDENT:
                x, self.y = start, self.y + LINE
            said = f"{kind} {device_label(device)}"
            ill = f"{device.health}: {device.reason}" if device.health != "healthy" else ""
            self._cell((x, self.y), device.state, device.holders, said, ill)
            if label:
                self._text(x + PITCH + 3, self.y + 10, label)
            x += width
        self.y += LINE

    def _cell(
        self,
        where: tuple[int, int],
        state: PartState,
        holders: Sequence[int],
        what: str,
        ill: str = "",
        pitch: int = PITCH,
    ) -> None:
        """Draw one CPU or device with its holder's letter."""
        x, y = where
        mark = part_mark(self._picture, state, holders)
        names = ", ".join(self._picture.holders[one].name for one in holders)
        said = f"{what}: {names or state}" + (f"; {ill}" if ill else "")
        look = f' fill="{colour_of(holders[0])}"' if holders else ""
        classes = " ".join(filter(None, ("" if holders else _FILLS[state], "ill" if ill else "")))
        look += f' class="{classes}"' if classes else ""
        square = f'x="{x}" y="{y}" width="{pitch - 1}" height="{pitch - 1}" rx="2"'
        self.parts.append(f"<g><title>{_safe(said)}</title><rect {square}{look}/>")
        if holders:
            self.parts.append(
                f'<text class="c" x="{x + (pitch - 1) / 2:g}" y="{y + pitch / 2 + 3:g}">{_safe(mark.text)}</text>'
            )
        self.parts.append("</g>\n")

    # ---------------------------------------------------------------- text

    def _legend(self) -> None:
        for index, holder in enumerate(self._picture.holders):
            self._cell((MARGIN, self.y), FREE, (index,), "legend")
            items: list[Item] = [(plain(one),) for one in (f"{holder.name}:", *" ".join(holdings(holder)).split())]
            self._lines(items, MARGIN + PITCH + 5)
        self.y += 4
        self._lines(words(f"CPUs: {', '.join(summary_parts(self._picture))}"), MARGIN, style="q")

    def _lines(self, items: Iterable[Item], x: int, style: str = "") -> None:
        """Write text over as many lines as it needs."""
        for line in wrapped(items, int((WIDTH - x - MARGIN) / CHARACTER)):
            self._text(x, self.y + 10, text_of(line), style)
            self.y += LINE

    def _text(self, x: int, y: int, text: str, style: str = "") -> None:
        look = f' class="{style}"' if style else ""
        self.parts.append(f'<text x="{x}" y="{y}"{look}>{_safe(text)}</text>\n')


def _by_kind(devices: Iterable[PictureDevice]) -> Iterator[tuple[str, list[PictureDevice]]]:
    found: dict[str, list[PictureDevice]] = {}
    for device in devices:
        found.setdefault(device.kind, []).append(device)
    yield from found.items()


def _safe(text: str) -> str:
    return escape(printable(text))
