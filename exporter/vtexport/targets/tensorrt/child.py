"""Compiles a TensorRT plan in a process of its own: a crash of TensorRT ends that process, not this one.

The parent writes a job as JSON to the child's stdin; the child ends when the parent does. The child reports progress, warnings and errors as lines of JSON on
its stdout, and writes the plan to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtexport import errors
from vtexport.errors import TargetError, VtexportError
from vtexport.stopping import die_with, undisturbed
from vtexport.targets.tensorrt.builder import Build, Settings, build_plan


def compile_apart(package: str, plugins: Path | None, source: Path, plan: Path, build: Build) -> None:
    """Compile the ONNX file `source` into the file `plan`.

    Args:
        package: the module of TensorRT's Python bindings.
        plugins: the library of plugins to register first; None for none.
        source: the ONNX file.
        plan: the file to write.
        build: the rest of the job.

    Raises:
        TargetError: TensorRT refused the graph or crashed.
        InputError: see `build_plan`.
        OSError: the plan cannot be written.
    """
    settings = asdict(build.settings) | {"timing_cache": _text(build.settings.timing_cache)}
    job = {
        "package": package,
        "plugins": _text(plugins),
        "source": str(source),
        "plan": str(plan),
        "name": build.name,
        "profiles": build.profiles,
        "settings": settings,
        "parent": os.getpid(),
    }
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            # A child that ends before it has read its job says why by how it ends.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(job))
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            for line in child.stdout:
                _hear(json.loads(line), build)
            status = child.wait()
        finally:
            with undisturbed():
                child.kill()
                child.wait()
                child.stdout.close()
        if status != 0:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise TargetError(
                f"TensorRT crashed while it compiled {build.name} ({_ending(status)}{''.join(f': {x}' for x in last)}); "
                "please report this model"
            )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _ending(status: int) -> str:
    """How a process ended, in words."""
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


def _hear(report: list[Any], build: Build) -> None:
    """Pass a report of the child on."""
    what, *details = report
    if what == "error":
        name, text = details
        raise getattr(errors, name)(text)
    if what == "disk":
        raise OSError(*details)
    handlers: dict[str, Callable[..., None]] = {"report": build.report, "advance": build.advance, "warn": build.warn}
    handlers[what](*details)


def main() -> None:
    """Do the job that stdin describes."""
    # Native code may print to stdout; the reports keep theirs.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(*report: object) -> None:
        print(json.dumps(report), file=reports, flush=True)

    # Ctrl-C reaches every process of the terminal; the parent ends this one when it has stopped itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.load(sys.stdin)
    die_with(job["parent"])
    cache = job["settings"]["timing_cache"]
    build = Build(
        job["name"],
        job["profiles"],
        Settings(**job["settings"] | {"timing_cache": None if cache is None else Path(cache)}),
        lambda text, total: say("report", text, total),
        lambda steps: say("advance", steps),
        lambda text: say("warn", text),
    )
    try:
        from vtexport.targets.tensorrt.bindings import bindings

        tensorrt = bindings(job["package"])
        if job["plugins"] is not None:
            from vtexport.native import plugins

            plugins.load(tensorrt.trt.get_plugin_registry(), Path(job["plugins"]))
        build_plan(tensorrt, Path(job["source"]), Path(job["plan"]), build)
    except VtexportError as error:
        say("error", type(error).__name__, str(error))
    except OSError as error:
        say("disk", error.errno, error.strerror)


if __name__ == "__main__":
    main()
