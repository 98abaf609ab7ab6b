"""The roads that there are, and the way down each of them."""

from __future__ import annotations

from pathlib import Path

from vtexport.bundle.folder import Bundle
from vtexport.bundle.writing import check_destination, write_folder
from vtexport.deploy.base import Road
from vtexport.deploy.transformers_js.road import TransformersJs
from vtexport.deploy.triton.road import TritonRoad

_ALL: tuple[Road, ...] = (TritonRoad(), TransformersJs())
#: roads by name
ROADS = {road.name: road for road in _ALL}


def deploy(bundle: Bundle, road: Road, out: Path) -> str:
    """Write `bundle` into `out` as `road` has it, whole or not at all.

    Returns:
        the command that starts it.

    Raises:
        InputError: the road cannot take the bundle, or `out` is not empty, or another process writes there.
        StorageError: `out` cannot be written.
    """
    check_destination(out, force=False, name="OUT")
    road.check(bundle)
    with write_folder(out, name="OUT") as folder:
        command = road.write(bundle, folder)
    return command.replace("OUT", str(out))
