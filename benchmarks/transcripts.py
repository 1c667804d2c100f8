"""Run the demo and keep what it printed, for README: the closing table and the right key's verdict.

python benchmarks/transcripts.py && python benchmarks/tables.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    command = [Path(sys.executable).parent / "hf-watermark", "demo", "--out", "demo-output"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    said = re.search(r"^ +\$ verify_hub_model .*owner\.key.*\n((?: +\|.*\n)+)", done.stderr, re.M)
    if said is None:
        raise SystemExit("The demo shows no verdict any more")
    lines = [re.sub(r"^ +\| ?", "", line) for line in said[1].splitlines()]
    (RESULTS / "demo.txt").write_text(done.stdout)
    (RESULTS / "verify.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
