"""Images and questions to calibrate micro-llava on, from its training split; `python -m vtexport.micro.pairs FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from vtexport.errors import VtexportError
from vtexport.micro import scenes

SEED = 1789
NUM_PAIRS = 144 * len(scenes.KINDS)


def write_pairs(folder: Path, number: int = NUM_PAIRS) -> Path:
    """Write `number` images and `pairs.jsonl` into `folder`, with each kind of question in turn; return the latter."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place in range(number):
        rng = np.random.default_rng([SEED, place])
        scene = scenes.compose(rng, "train")
        kind = scenes.KINDS[place % len(scenes.KINDS)]
        pool = [question for question in scenes.questions(scene) if question.kind == kind]
        name = f"{place:03}.png"
        Image.fromarray(scene.image).save(folder / name)
        lines.append(json.dumps({"image": name, "prompt": pool[rng.integers(len(pool))].text}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write pairs of image and question, as micro-llava is calibrated with."
    )
    parser.add_argument("folder", type=Path, help="where to; it is made if it is not there")
    try:
        sys.stdout.write(f"{write_pairs(parser.parse_args().folder)}\n")
    except VtexportError as error:
        parser.error(str(error))
