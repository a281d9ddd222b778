"""python -m minillava.kernels.tools.every_triton [FOLDER]: the compile table's tests under each Triton that is allowed.

Each version is installed by itself into FOLDER (default: .venv/tritons), put in front of the packages that are here,
and has a cache of its own. What `pyproject.toml` allows, one release of each.
"""

import os
import subprocess
import sys
from pathlib import Path

VERSIONS = "3.6.0", "3.7.1", "3.8.0", "3.9.0"
TESTS = "tests/kernels/test_compile.py", "tests/kernels/test_coordinates.py", "tests/layers/test_decode.py"


def environment(version: str, folder: Path) -> dict[str, str]:
    """Variables under which Python finds that Triton first."""
    packages = folder / version
    if not (packages / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    paths = [str(packages), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder / f"cache-{version}")}


def main(folder: str = ".venv/tritons", *tests: str) -> int:
    failed = []
    for version in VERSIONS:
        variables = environment(version, Path(folder).absolute())
        found = "import triton; print(triton.__version__)"
        done = subprocess.run([sys.executable, "-c", found], env=variables, capture_output=True, text=True, check=True)
        print(f"Triton {done.stdout.strip()}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *(tests or TESTS)]
        if done.stdout.strip() != version or subprocess.run(command, env=variables).returncode:
            failed.append(version)
    print(f"failed under Triton {', '.join(failed)}" if failed else "all versions passed")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
