"""The vision stage's outputs of recent images, so that another question about an image skips the tower."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from vtexport.arrays import Array
from vtexport.pruning import PruningPlan
from vtexport.runtime.inputs import look, vision_extras
from vtexport.runtime.request import Request
from vtexport.targets.engine import Engine, VisionOutput

#: default bound: about ten images of LLaVA-1.5-7B in fp16, unpruned
DEFAULT_BYTES = 64 << 20


class VisionCache:
    """Outputs by what the vision graph was given; the least recently used leave first. Threads may share it.

    Args:
        limit: bytes of outputs at most; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._rows: OrderedDict[bytes, Mapping[str, Array]] = OrderedDict()
        # Not held while the graph runs: two threads that ask about a new image at once both look at it.
        self._lock = threading.Lock()

    def look(self, engine: Engine, plan: PruningPlan, requests: Sequence[Request]) -> VisionOutput:
        """The vision graph of `plan` on the images of `requests`, each different one run at most once."""
        if self._limit <= 0:
            return look(engine, plan, requests)
        keys = [_key(plan, request) for request in requests]
        known = self._found(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        if missing:
            seen = look(engine, plan, list(missing.values()))
            if not all(isinstance(array, np.ndarray) for array in seen.arrays.values()):
                # On a device, where a copy would cost what it saves. Later calls need not hash in vain, or look twice.
                self._limit = 0
                return seen if len(missing) == len(requests) else look(engine, plan, requests)
            for row, key in enumerate(missing):
                known[key] = {name: array[row].copy() for name, array in seen.arrays.items()}
                self._keep(key, known[key])
        names = known[keys[0]]
        return VisionOutput({name: np.stack([known[key][name] for key in keys]) for name in names})

    def _found(self, keys: Sequence[bytes]) -> dict[bytes, Mapping[str, Array]]:
        """The outputs that are there for `keys`, which are now the most recently used."""
        with self._lock:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
            return found

    def _keep(self, key: bytes, row: Mapping[str, Array]) -> None:
        with self._lock:
            if key in self._rows:
                return  # another thread was faster
            self._rows[key] = row
            self._bytes += _size(row)
            while self._bytes > self._limit:
                _, oldest = self._rows.popitem(last=False)
                self._bytes -= _size(oldest)


def _size(row: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in row.values())


def _key(plan: PruningPlan, request: Request) -> bytes:
    """A hash of all that the vision graph is given for `request`."""
    digest = hashlib.sha256(request.views.pixels.tobytes())
    if request.views.rows is not None:
        for array in (request.views.rows.sequence, request.views.rows.row_start):
            digest.update(array.tobytes())
    for name in vision_extras(plan):
        digest.update(name.encode() + request.extras[name].tobytes())
    return digest.digest()
