"""The machine code of the kernels: what nvcc made of them for every GPU, read from a disassembly.

Nobody has run this code, so that at least its instructions are looked at: products of 16-bit elements on tensor cores,
their tiles loaded by LDSM, nothing in local memory, and no load or store that the GPU must first find the memory of.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.plugins.conftest import ARCHITECTURES, NEEDS, SOURCE, Built
from vtexport.native.plugins import LIBRARY


def disassembler() -> Path | None:
    """cuobjdump, from its wheel; it calls nvdisasm, which another wheel puts beside it."""
    spec = find_spec("nvidia.cu13") if find_spec("nvidia") is not None else None
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    found = (Path(folder) / "bin" / "cuobjdump" for folder in folders)
    return next((path for path in found if path.is_file() and path.with_name("nvdisasm").is_file()), None)


pytestmark = [
    *NEEDS,
    pytest.mark.skipif(
        disassembler() is None, reason="needs a disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ),
]

HALF, BFLOAT16 = "6__half", "13__nv_bfloat16"  # as C++ mangles them
#: the kernels that multiply elements, by the file that they are in
PRODUCTS = {"token_score": ("attend", "measure", "add_columns"), "token_recycle": ("measure",)}
#: generic loads that a kernel does have, from sm_90 on: of the shared memory of up to eight blocks of its cluster
OF_CLUSTER = {("token_score", "attend"): 8}
#: GPUs of one generation get nearly the same code
SAMPLE = (75, 80, 90, 120)


class Kernel(NamedTuple):
    """A kernel in a file of `plugins/cuda`; `element` is empty if it is no template of an element's type."""

    file: str
    name: str
    element: str


def instructions(library: Path, architecture: int) -> dict[Kernel, Counter[str]]:
    """How often each kernel has each instruction, without the modifiers behind the first point."""
    command = [disassembler(), "-sass", "-arch", f"sm_{architecture}", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[Kernel, Counter[str]] = {}
    for part in text.split("Function : ")[1:]:
        mangled, _, code = part.partition("\n")
        # …_ <file> _cu_ <hash of eight digits> <length> <name> [I <element> E] …
        match = re.search(r"\d_([a-z_]+)_cu_[0-9a-f]{8}(\d+)([a-z_]+)(?:I(\w+?)E)?", mangled)
        assert match is not None, mangled
        file, length, name, element = match.groups()
        # Without template arguments, the signature follows the name.
        kernel = Kernel(file, name[: int(length)], (element or "") if int(length) == len(name) else "")
        names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
        found[kernel] = Counter(names)
    return found


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(one, marks=[] if one in SAMPLE else pytest.mark.long) for one in ARCHITECTURES],
)
def test_kernels_use_what_their_gpu_has(built: Built, architecture: int) -> None:
    found = instructions(built.folder / LIBRARY, architecture)
    assert {kernel.file for kernel in found} == {path.stem for path in (SOURCE / "plugins" / "cuda").glob("*.cu")}
    for kernel, count in found.items():
        assert count["LDL"] == count["STL"] == 0, kernel  # local memory
        of_cluster = OF_CLUSTER.get((kernel.file, kernel.name), 0) if architecture >= 90 else 0
        assert (count["LD"], count["ST"]) == (of_cluster, 0), kernel  # generic
        assert count["LDG"] > 0, kernel
    for file, names in PRODUCTS.items():
        for name in names:
            for element in (HALF, BFLOAT16, "f"):
                kernel = Kernel(file, name, element)
                count = found[kernel]
                # Turing's tensor cores take no bf16, and fp32 would lose digits on any.
                on_tensor_cores = element == HALF or (element == BFLOAT16 and architecture >= 80)
                assert (count["HMMA"] > 0) == (count["LDSM"] > 0) == on_tensor_cores, kernel
                assert (count["LDGSTS"] > 0) == (architecture >= 80), kernel  # copies beside the arithmetic
