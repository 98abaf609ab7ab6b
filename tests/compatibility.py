"""Runs a part of the tests against the oldest, or the newest, releases of everything that vtexport depends on.

    python tests/compatibility.py oldest
    python tests/compatibility.py newest --pin 'torch<2.15' --folder /tmp/newest

`oldest` installs, for each requirement of pyproject.toml, the oldest release that it admits and that goes with the
others: what pyproject.toml promises is what is tested. `newest` installs what there is without constraints.txt. uv, which
it installs, chooses both. vtexport comes as a wheel, without the CUDA kernels, into a virtual environment of its own;
`--folder` keeps it for the next run. The last line is one JSON object: versions, and how many tests passed. The exit code
is pytest's.

On Linux, PyPI's PyTorch brings several GB of CUDA libraries. `--pin` takes further requirements, for instance of a CPU
build; uv's own settings, such as UV_FIND_LINKS, say where that is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
#: whose releases the sets differ in; the tools that run the tests are the newest in both
EXTRAS = ("openvino", "tensorrt-rtx", "micro", "serve", "plots")
#: builds, runs, self-checks and parity on each runtime, and every interface of another package that vtexport uses
TESTS = (
    "tests/graph",
    "tests/models",
    "tests/pruning",
    "tests/serve",
    "tests/targets/test_openvino.py",
    "tests/targets/test_quantize.py",
    "tests/targets/test_tensorrt.py",
    "tests/deploy/test_transformers_js.py",
    "tests/deploy/test_triton.py",
    "tests/test_bundle.py",
    "tests/test_cli.py",
    "tests/test_conversations.py",
    "tests/test_evaluate.py",
    "tests/test_extension.py",
    "tests/test_hostile_inputs.py",
    "tests/test_pages.py",
)


def requirements() -> list[Requirement]:
    """What pyproject.toml requires at run time, with all extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in stated]


def install(folder: Path, which: str, pins: list[str]) -> Path:
    """The Python of a virtual environment in which vtexport and the chosen releases are installed."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    stated = chosen = folder / "pins.txt"
    stated.write_text("".join(f"{pin}\n" for pin in pins))
    uv = [python, "-m", "uv", "pip"]
    if which == "oldest":
        extras = [word for name in EXTRAS for word in ("--extra", name)]
        # Pins by hand replace what pyproject.toml says: those of a CPU build, say.
        limits = ["--resolution", "lowest-direct", "--overrides", stated, "--no-annotate", "--upgrade"]
        chosen = folder / "constraints.txt"
        subprocess.run(
            [*uv, "compile", "--quiet", "--python", python, *extras, *limits, "-o", chosen, ROOT / "pyproject.toml"],
            check=True,
        )
    settings = ["-C", "cmake.define.VTEXPORT_CUDA=OFF", "-C", "cmake.define.VTEXPORT_TWINS=ON"]
    wanted = f"{ROOT}[{','.join((*EXTRAS, 'test'))}]"
    subprocess.run([*uv, "install", "--upgrade", "--python", python, "-c", chosen, *settings, wanted], check=True)
    return python


def run(python: Path, arguments: list[str]) -> tuple[int, dict[str, int], list[str]]:
    """The exit code of pytest, how many tests ended in each way, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Other releases may warn of what this one's tests make errors of; what counts here is that it works.
        command = [python, "-m", "pytest", "-W", "default", f"--junitxml={report}", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not report.is_file():
            return code, {}, []
        cases = list(ElementTree.parse(report).iter("testcase"))
    ways = [
        next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed") for case in cases
    ]
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case, way in zip(cases, ways, strict=True)
        if way in ("failure", "error")
    ]
    return code, {way: ways.count(way) for way in sorted(set(ways))}, bad


def versions(python: Path) -> dict[str, str]:
    """The installed version of every requirement."""
    names = [requirement.name for requirement in requirements()]
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-I", "-c", code, *names], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Install a set, run the tests with it, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument(
        "--folder", type=Path, help="the virtual environment; without it, one that is deleted afterwards"
    )
    parser.add_argument("--pin", action="append", default=[], help="a further requirement, such as 'torch==2.13.0'")
    parser.add_argument("tests", nargs="*", default=[], help="arguments of pytest; without any, a part of the suite")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        python = install(given.folder or Path(own), given.which, given.pin)
        code, ways, bad = run(python, given.tests or list(TESTS))
        outcome = {"set": given.which, "python": sys.version.split()[0], "versions": versions(python)}
    print(json.dumps({**outcome, **ways, "failed": bad}))
    return code


if __name__ == "__main__":
    sys.exit(main())
