"""A method and a target of someone else's, added as CONTRIBUTING.md says: a class, and a line in the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import MICRO

#: what a file in `vtexport/pruning/` and one in `vtexport/targets/` would hold, and the lines that list them
TOYS = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from vtexport.options import Meta
from vtexport.pruning import METHODS
from vtexport.pruning.decoder import DecoderMethod, Scheduled
from vtexport.pruning.schedule import one_stage, parse_layers
from vtexport.pruning.vision import Pruned, VisionMethod
from vtexport.targets import TARGETS
from vtexport.targets.onnxruntime.target import OnnxRuntimeTarget


@dataclass(frozen=True)
class Comb(VisionMethod):
    """Patches at a fixed stride, then the first of the others."""

    name = "comb"
    summary = "every so manieth patch"
    stride: Annotated[int, Meta(ge=2, le=9, description="Distance between the patches that stay first.")] = 3

    def constants(self, plan, grid):
        every = np.arange(grid * grid)
        chosen = np.concatenate([every[:: self.stride], np.setdiff1d(every, every[:: self.stride])])
        return {"index": np.sort(chosen[: plan.patch_budget]).astype(np.int32)}

    def select(self, state, plan, constants: Mapping):
        tokens = state.patches.index_select(1, constants["index"])
        return Pruned(tokens, constants["index"].expand(tokens.shape[0], -1))


@dataclass(frozen=True)
class Loudest(DecoderMethod):
    """The visual tokens that the last prompt token attends to, after one layer."""

    name = "loudest"
    summary = "what the last token attends to"
    scores = True
    at: Annotated[int, Meta(ge=0, description="The layer to prune after.")] = 2

    def scheduled(self, budget):
        return Scheduled(self, one_stage(parse_layers(str(self.at), budget.num_layers), budget, self.name))


@dataclass(frozen=True)
class Elsewhere(OnnxRuntimeTarget):
    name: ClassVar[str] = "elsewhere"
    summary: ClassVar[str] = "a runtime of someone else's"
    rooms: Annotated[int, Meta(ge=1, description="Rooms that it has.")] = 1


METHODS |= {method.name: method for method in (Comb, Loudest)}
TARGETS[Elsewhere.name] = Elsewhere
'''
RUN = "from vtexport.cli.main import main\nmain()\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command line with the toys in it."""
    script = tmp_path_factory.mktemp("toys") / "toys.py"
    script.write_text(TOYS + RUN)
    return script


def call(program: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_help_and_lists_know_them(program: Path, tmp_path: Path) -> None:
    shown = " ".join(call(program, "build", "--help", folder=tmp_path).stdout.split())
    assert "--stride NUMBER Distance between the patches that stay first. For comb. [default: 3]" in shown
    assert "--at NUMBER The layer to prune after. For loudest. [default: 2]" in shown
    assert "--rooms NUMBER Rooms that it has. For elsewhere. [default: 1]" in shown
    listed = json.loads(call(program, "list", "--json", folder=tmp_path).stdout)
    assert listed["methods"]["comb"] == "every so manieth patch"
    assert listed["targets"]["elsewhere"] == "a runtime of someone else's"
    assert "elsewhere build" in call(program, "doctor", folder=tmp_path).stdout


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (
            ["--method", "comb", "--stride", "1"],
            "--stride 1 is out of range; give a whole number at least 2 and at most 9",
        ),
        (["--method", "comb", "--at", "1"], "--at has no effect with method comb; leave it out"),
        (["--method", "comb", "--rooms", "1"], "--rooms has no effect with target onnxruntime; leave it out"),
        (["--method", "comb", "--debug"], "--debug has no effect with method comb"),
        (["--method", "loudest", "--at", "11"], "--layers 11 is out of range"),
        (["--method", "comb+fastervlm"], "cannot be combined"),
    ],
)
def test_what_cannot_be_is_refused(program: Path, options: list[str], refusal: str, tmp_path: Path) -> None:
    done = call(program, "build", "--model", MICRO, "--keep", "0.5", "--out", "out", *options, folder=tmp_path)
    assert done.returncode == 2
    assert refusal in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_they_are_built_checked_combined_and_run(program: Path, photo: Path, tmp_path: Path) -> None:
    options = [
        "--method",
        "comb+loudest",
        "--vision-keep",
        "0.5",
        "--stride",
        "2",
        "--at",
        "4",
        "--target",
        "elsewhere",
        "--rooms",
        "3",
    ]
    done = call(program, "build", "--model", MICRO, "--keep", "0.3", *options, "--out", "toy", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "same kept tokens, same greedy tokens" in done.stdout
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    assert manifest["plans"][0]["options"] | {"stride": 2, "at": 4} == manifest["plans"][0]["options"]
    assert manifest["target"]["options"] == {"quantize": "", "rooms": 3}
    done = call(
        program, "run", "toy", "--image", photo, "--prompt", "how many digits are there?", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    vision, decoder = json.loads(done.stdout)["stages"]
    assert vision["index"][:3] == [0, 2, 4]
    assert decoder["where"] == "decoder.4"
    assert decoder["kept"] < vision["kept"] == decoder["in"]


def test_the_docs_would_have_to_name_them() -> None:
    """Tables of options are rendered from the classes, and a test holds the pages to them."""
    code = TOYS + "import sys\nsys.path.insert(0, 'benchmarks')\nimport tables\nprint(*tables.outdated())\n"
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "docs/methods.md" in done.stdout
