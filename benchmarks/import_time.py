"""What `from signstep import SignSGD` adds to `import torch`: median and range over fresh
interpreters.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

PAIRS = 11
CODE = """
import time
import torch
started = time.perf_counter()
from signstep import SignSGD
print((time.perf_counter() - started) * 1e3)
"""


def main() -> None:
    """Print the milliseconds that the import takes once torch is there."""
    runs = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(PAIRS)]
    print(
        f"from signstep import SignSGD after import torch: median {statistics.median(runs):.1f} ms, "
        f"{min(runs):.1f} to {max(runs):.1f} over {PAIRS} fresh interpreters"
    )


if __name__ == "__main__":
    main()
