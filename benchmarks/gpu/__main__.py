"""python -m benchmarks.gpu [PART…]: every part, or those that are named; a summary in JSON at the end.

Exit code 1 if a part failed; what is not possible on this machine is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.parts import PARTS, Machine, NotPossible, Outcome, Result
from nodeagent.errors import NodeagentError


def run(part: Callable[[Machine], Result], machine: Machine) -> Result:
    """Return the result of a part; its errors are failures of it alone."""
    try:
        return part(machine)
    except NotPossible as why:
        return Result(Outcome.NOT_POSSIBLE, [str(why)])
    except (NodeagentError, OSError, ValueError, subprocess.SubprocessError) as error:
        return Result(Outcome.FAIL, [f"{type(error).__name__}: {error}"])


def main(names: list[str]) -> int:
    """Run the parts and print what each has shown. Return the exit code."""
    if unknown := [one for one in names if one not in PARTS]:
        print(f"there is no part {', '.join(unknown)}: expected {', '.join(PARTS)}", file=sys.stderr)
        return 2
    machine, summary = Machine(), dict[str, Any]()
    for name in names or PARTS:
        began = time.monotonic()
        outcome, seen = run(PARTS[name], machine)
        took_s = round(time.monotonic() - began, 1)
        print(f"{outcome}: {name}, {took_s} s", *(f"  {line}" for line in seen), sep="\n", flush=True)
        summary[name] = {"outcome": outcome, "seen": list(seen), "took_s": took_s}
    print(json.dumps({"gpus": [one.id for one in machine.gpus], "parts": summary}))
    return int(any(one["outcome"] == Outcome.FAIL for one in summary.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
