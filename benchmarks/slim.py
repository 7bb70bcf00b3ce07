"""Keeps of a saved benchmark what says what was measured, and on what.

    python benchmarks/slim.py saved.json...

Rewrites each file: the GPU, the CPU, library versions, and the extra_info of every benchmark.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        saved = json.loads(path.read_text(encoding="utf-8"))
        machine = saved["machine_info"]
        slim = {
            "machine": {
                "gpu": machine.get("gpu"),
                "gpu_runtime": machine.get("gpu_runtime"),
                "cpu": machine["cpu"].get("brand_raw"),
                "packages": machine["packages"],
            },
            "benchmarks": [
                {"name": benchmark["name"], **benchmark["extra_info"]}
                for benchmark in saved["benchmarks"]
            ],
        }
        path.write_text(json.dumps(slim, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
