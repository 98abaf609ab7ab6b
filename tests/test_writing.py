"""What is written comes into place whole, takes nothing else away, and says in one line why it could not."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import check_refused
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.bundle import claims
from vtexport.bundle import writing as folders
from vtexport.bundle.claims import claimed
from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST
from vtexport.bundle.writing import check_destination, write_folder
from vtexport.cli import main as cli
from vtexport.errors import InputError, StorageError, VtexportError
from vtexport.stopping import SIGNALS, Stopped, Stopping, undisturbed
from vtexport.writing import Output, check_apart, check_file, write_all, write_whole

LONG = "a" * 300


def write(out: Path, text: str = "new", force: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
    with write_folder(out, force) as folder:
        (folder / MANIFEST).write_text(text)
        meanwhile()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_another_process(code: str, *arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]


# Folders


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a file system that exchanges folders at once."""
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchanged", lambda _one, _other: False)


@pytest.mark.usefixtures("swap")
def test_force_replaces_the_bundle_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    with pytest.raises(InputError, match="--force"):
        write(out)
    write(out, "new", force=True)
    assert (out / MANIFEST).read_text() == "new"
    assert names(tmp_path) == ["bundle"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~folders.umask()


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("force", [False, True])
def test_what_comes_to_the_destination_meanwhile_stays(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "bundle"
    if force:
        write(out, "old")

    def other() -> None:
        out.mkdir(exist_ok=True)
        (out / "other").write_text("another's")
        (out / "new").write_text("another's")
        (out / "new").rename(out / MANIFEST)

    with pytest.raises(InputError, match="changed while this ran and was left as it is"):
        write(out, "new", force, other)
    assert (out / MANIFEST).read_text() == "another's"
    assert names(tmp_path) == ["bundle"]


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="changed while this ran"):
        write(out, meanwhile=lambda: out.write_text("another's"))
    assert out.read_text() == "another's"


@pytest.mark.usefixtures("swap")
def test_an_old_bundle_that_goes_meanwhile_is_not_missed(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    write(out, "new", force=True, meanwhile=lambda: out.rename(tmp_path / "kept"))
    assert names(tmp_path) == ["bundle", "kept"]


def test_an_empty_folder_is_replaced_and_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == [MANIFEST]


def test_a_second_build_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def second() -> None:
        with pytest.raises(
            InputError, match=r"another process is writing .*bundle; wait for it, or give another --out"
        ):
            check_destination(out, force=True)
        with pytest.raises(InputError, match="another process is writing"):
            write(out, "second")

    write(out, "first", meanwhile=second)
    assert (out / MANIFEST).read_text() == "first"
    assert names(tmp_path) == ["bundle"]


def test_of_many_writers_those_that_succeed_are_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vtexport.bundle.writing import write_folder\n"
        "from vtexport.errors import InputError\n"
        "out = Path(sys.argv[1])\n"
        "try:\n"
        "    with write_folder(out) as folder: (folder / 'manifest.json').write_text(sys.argv[2]); sys.stdin.read(1)\n"
        "except InputError as error: sys.exit(str(error))"
    )
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    out = tmp_path / "bundle"
    writers = [subprocess.Popen([sys.executable, "-c", code, out, str(n)], **pipes) for n in range(3)]  # type: ignore[call-overload]
    said = [writer.communicate("go")[1] for writer in writers]
    won = [number for number, writer in enumerate(writers) if writer.returncode == 0]
    assert len(won) == 1, said
    assert (out / MANIFEST).read_text() == str(won[0])
    assert names(tmp_path) == ["bundle"]


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code = (
        "import os, signal, sys; from pathlib import Path; from vtexport.bundle.writing import write_folder\n"
        "with write_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert in_another_process(code, out).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".bundle.vtexport-building"]
    (tmp_path / ".other.vtexport-building").mkdir()
    check_destination(out, force=False)
    assert names(tmp_path) == [".other.vtexport-building"]
    write(out)
    assert names(out) == [MANIFEST]


def test_a_bundle_lost_between_two_renames_is_put_back(tmp_path: Path) -> None:
    out, old = tmp_path / "bundle", tmp_path / ".bundle.vtexport-old"
    write(out, "old")
    out.rename(old)
    with pytest.raises(InputError, match="already holds a bundle"):
        check_destination(out, force=False)
    assert (out / MANIFEST).read_text() == "old"
    assert names(tmp_path) == ["bundle"]
    # Killed after the second rename, it is in the way no more.
    old.mkdir()
    (old / MANIFEST).write_text("older")
    check_destination(out, force=True)
    assert names(tmp_path) == ["bundle"]


def test_without_locks_everyone_has_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtexport.bundle.claims.lock", lambda _number: None)
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="changed while this ran"):
        write(out, "first", meanwhile=lambda: write(out, "second"))
    assert (out / MANIFEST).read_text() == "second"
    write(out, "third", force=True)
    assert names(tmp_path) == ["bundle"]


def test_a_claim_is_taken_over_only_where_it_lies(tmp_path: Path) -> None:
    """What is opened before its owner moves it away is not taken for one's own."""
    place = tmp_path / "bundle"
    with claimed(place, place, "--out") as folder:
        inode = folder.stat().st_ino
        folder.rename(tmp_path / "moved")
        with claimed(place, place, "--out") as other:
            assert other == folder
            assert other.stat().st_ino != inode
    assert names(tmp_path) == ["moved"]


def test_a_read_only_old_bundle_goes(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    (out / "engine").mkdir()
    (out / "engine" / "file").write_text("")
    (out / "engine").chmod(0o500)
    write(out, "new", force=True)
    assert names(tmp_path) == ["bundle"]


def test_places_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out, message in (
        (Path("."), "is the current folder"),
        (Path("/proc"), "is where a file system is mounted"),
        (Path(LONG), "File name too long; give another --out"),
        (Path(LONG) / "out", "is not a writable folder|File name too long"),
        (Path("a" * 250), "File name too long; give another --out"),
        (Path("a\0b"), "is no name of a folder"),
    ):
        with pytest.raises(VtexportError, match=message):
            check_destination(out, force=True)
    assert names(tmp_path) == []


def test_a_failed_build_leaves_no_parents(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(StorageError, match="bundle: File too large; free some space or give another --out, nothing"):
        write(tmp_path / "one" / "two" / "bundle", meanwhile=fail)
    assert names(tmp_path) == []
    with pytest.raises(StorageError, match=r"^/nowhere: No such file or directory; nothing was written"):
        write(tmp_path / "one" / "two" / "bundle", meanwhile=Path("/nowhere").read_bytes)


def test_a_full_disk_is_not_blamed_on_what_is_copied(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/weights", None, str(tmp_path / "part"))

    with pytest.raises(
        StorageError, match="bundle: No space left on device; free some space or give another --out, noth"
    ):
        write(tmp_path / "bundle", meanwhile=fail)


# Faults


@pytest.fixture(scope="session")
def fault() -> Iterator[dict[str, int]]:
    """Fails the event of number `at` of those that write, once; `seen` counts them. Hooks cannot be taken off again."""
    state = {"at": 0, "seen": 0}

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if not state["at"] or event not in ("open", "os.mkdir", "os.rename", "os.link", "os.chmod"):
            return
        flags = arguments[-1]
        if event == "open" and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            return
        state["seen"] += 1
        if state["seen"] == state["at"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    sys.addaudithook(hook)
    yield state
    state["at"] = 0


@pytest.mark.parametrize("force", [False, pytest.param(True, marks=pytest.mark.long)])
def test_whatever_fails_nothing_is_half_written(
    tiny_checkpoint: Path, tmp_path: Path, fault: dict[str, int], force: bool
) -> None:
    """Each opening, renaming and linking of a small build fails in turn."""
    out, at, failed = tmp_path / "bundle", 0, 0
    while at == 0 or fault["seen"] >= at:
        if force and not (out.exists() and Bundle.open(out).manifest.plans[0].keep == 0.4):
            build(BuildOptions(str(tiny_checkpoint), 0.4, "random", self_check=False), out, force=True)
        at += 1
        found = _failing(
            lambda: build(BuildOptions(str(tiny_checkpoint), 0.8, "random", self_check=False), out, force=force),
            fault,
            at,
        )
        if found is None:
            # Some steps have another way: what cannot be linked is copied. Then the bundle is there.
            assert Bundle.open(out).manifest.plans[0].keep == 0.8
            if not force:
                shutil.rmtree(out)
            continue
        failed += 1
        assert isinstance(found, VtexportError), f"event {at}: {found!r}"
        assert "\n" not in str(found)
        assert names(tmp_path) == (["bundle"] if force else []), f"event {at}"
    assert failed > 8


def _failing(call: Callable[[], object], fault: dict[str, int], at: int) -> Exception | None:
    fault.update(at=at, seen=0)
    try:
        call()
    except (VtexportError, OSError) as error:
        return error
    finally:
        fault["at"] = 0
    return None


def test_a_limit_on_file_sizes_is_one_line(vtexport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As a quota or a full disk: real failures of real writes, also of those in compiled libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused = vtexport("build", "--model", tiny_checkpoint, "--keep", "0.5", "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.code == 2
    said = "error: out: File too large; free some space or give another --out, nothing was written"
    assert refused.err.splitlines()[-1] == said
    assert "Traceback" not in refused.err
    assert names(tmp_path) == []


# Files


def test_files_come_together_or_not_at_all(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old")
    one.chmod(0o640)
    (tmp_path / "link").symlink_to("one")
    with pytest.raises(StorageError, match="give another --two"):
        write_all([Output(tmp_path / "link", "new"), Output(tmp_path / "nowhere" / "two", "new", "--two")])
    assert one.read_text() == "old"
    write_all([Output(tmp_path / "link", "new"), Output(two, b"\xff")])
    assert (one.read_text(), two.read_bytes()) == ("new", b"\xff")
    assert stat.S_IMODE(one.stat().st_mode) == 0o640
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "one", "two"]


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace", "fchmod"])
def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"vtexport.writing.{'tempfile' if call == 'mkstemp' else 'os'}.{call}", fail)
    with pytest.raises(StorageError, match="file: No space left on device; free some space or give another --json"):
        write_whole(path, "new", "--json")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, vtexport.writing as w; from pathlib import Path\n"
        "w.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "w.write_whole(Path(sys.argv[1]), 'new')"
    )
    path = tmp_path / "file"
    assert in_another_process(code, path).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    write_whole(path, "whole")
    assert names(tmp_path) == ["file"]
    # Two files of one process: the second writer must not take the first one's for abandoned.
    write_all([Output(path, "one"), Output(tmp_path / "other", "two")])
    assert (path.read_text(), (tmp_path / "other").read_text()) == ("one", "two")


def test_what_is_no_file_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    check_file(pipe, "--json")
    reader.start()
    write_whole(pipe, "through")
    reader.join()
    assert read == ["through"]
    assert names(tmp_path) == ["pipe"]
    code = (
        "import sys; from pathlib import Path; from vtexport.writing import write_whole\n"
        "print('before'); write_whole(Path('/dev/stdout'), 'through\\n'); print('after')"
    )
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "before\nthrough\nafter\n"


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    source = tmp_path / "photo.png"
    source.write_text("")
    (tmp_path / "same.png").symlink_to("photo.png")
    for path, message in (
        (tmp_path, "is a folder; give another -o"),
        (tmp_path / "no" / "x", "no is not a folder; give another -o"),
        (Path("/proc/x"), "give another -o"),
        (Path("/dev/full"), "No space left on device"),
        (tmp_path / LONG, "File name too long; give another -o"),
        (tmp_path / "a\0b", "embedded null byte; give another -o"),
        (tmp_path / "same.png", "is an input, which -o would overwrite"),
    ):
        with pytest.raises(VtexportError, match=message) as refused:
            check_file(path, "-o", [source])
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="--json and --html both name"):
        check_apart([("--json", source), ("--plot", None), ("--html", tmp_path / "same.png")])
    assert names(tmp_path) == ["photo.png", "same.png"]


def test_outputs_are_checked_before_the_work(vtexport, micro_bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    show, profile = ["show", micro_bundle, "--image", photo, "-o"], ["profile", micro_bundle, "--runs", "1"]
    calibrate = ["calibrate", "--model", "micro-llava", "--data", "pairs.jsonl", "-o"]
    for command, message in (
        *(([*show, f"kept.{suffix}"], "unknown image format") for suffix in ("psd", "cur", "xpm", "mpg", "h5", "")),
        ([*show, photo], "is an input, which -o would overwrite"),
        ([*profile, "--plot", "x.bmp"], "unknown image format; give a name that ends in .png, .svg or .pdf"),
        ([*profile, "--json", "folder"], "folder is a folder; give another --json"),
        ([*profile, "--json", "/dev/full"], "No space left on device"),
        ([*profile, "--json", "x.html", "--html", "x.html"], "both name x.html"),
        ([*calibrate, "folder"], "folder is a folder; give another -o"),
        ([*calibrate, "x.png", "--plot", "x.png"], "-o and --plot both name x.png"),
        (["eval", micro_bundle, "--output", LONG], "File name too long"),
        (["inspect", LONG], "is not a folder; give a bundle"),
        (["build", "--model", "~nobody-of-this-name/x", "--keep", "0.5", "--out", "out"], "unknown model"),
    ):
        check_refused(vtexport(*command), message, tmp_path, ["folder"])


# Signals


@pytest.fixture
def heard() -> Iterator[None]:
    """No signal is ignored, as a shell has it for what it runs in the background, and nohup for SIGHUP."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("a signal can end a worker of xdist; test_signals_in_a_process_of_their_own runs this test")
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="they run in this process already")
def test_signals_in_a_process_of_their_own() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__]
    chosen = "signals_are or a_stopped_command_says or is_not_denied"
    done = subprocess.run([*command, "-k", chosen], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


def test_signals_are_exceptions_and_wait_where_they_must(heard: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert (stopped.value.exit_code, stopping.number) == (143, signal.SIGTERM)
        done = []

        def work() -> None:
            with undisturbed():
                signal.raise_signal(signal.SIGHUP)
                done.append("all")

        with pytest.raises(Stopped):
            work()
        assert done == ["all"]
        stopping.end()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_stopped_command_says_what_became_of_its_result(
    vtexport,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heard: None,
    number: int,
    code: int,
) -> None:
    arguments = ["build", "--model", tiny_checkpoint, "--keep", "0.5", "--method", "fastervlm", "--out", "out"]
    monkeypatch.setattr("vtexport.builder.assemble.make_engines", lambda *_: signal.raise_signal(number))
    stopped = vtexport(*arguments)
    assert (stopped.code, stopped.out, stopped.err) == (code, "", "stopped; nothing was written\n")
    assert names(tmp_path) == []
    # A command that writes nothing does not say so.
    monkeypatch.setattr("vtexport.bundle.folder.Bundle.open", lambda _: signal.raise_signal(number))
    assert vtexport("inspect", "out").err == "stopped\n"


def test_signals_are_held_back_until_a_folder_is_known(
    monkeypatch: pytest.MonkeyPatch, heard: None, tmp_path: Path
) -> None:
    """A signal right behind the making of the folder does not leave it there."""
    claim = claims._claim

    def interrupted(folder: Path) -> int | None:
        number = claim(folder)
        signal.raise_signal(signal.SIGTERM)
        return number

    monkeypatch.setattr(claims, "_claim", interrupted)
    with Stopping(), pytest.raises(Stopped):
        write(tmp_path / "bundle")
    assert names(tmp_path) == []


def test_a_result_that_is_in_place_is_not_denied(
    monkeypatch: pytest.MonkeyPatch, heard: None, tmp_path: Path, capfd
) -> None:
    def command(**_: object) -> None:
        out = tmp_path / "bundle"
        check_destination(out, force=False)
        write(out)
        # As when Ctrl-C meets the summary.
        raise ImportError("interrupted while it was imported") from None if done else _stop()

    def _stop() -> Exception:
        try:
            signal.raise_signal(signal.SIGINT)
        except Stopped:
            return RuntimeError()
        raise AssertionError

    done: list[object] = []
    monkeypatch.setattr(cli.cli, "main", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capfd.readouterr().err == f"stopped; {tmp_path / 'bundle'} had been written\n"


def test_stdout_that_takes_no_more_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vtexport", "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: No space left on device; ")
    assert len(done.stderr.splitlines()) == 1


def test_a_child_ends_with_its_parent() -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys, time; from vtexport.stopping import die_with; "
        "die_with(int(sys.argv[1])); print(0, flush=True); time.sleep(60)', str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.read(1); print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = in_another_process(code)
    assert done.returncode == -signal.SIGKILL
    child, patience = Path(f"/proc/{done.stdout.strip()}"), time.monotonic() + 30
    while child.exists() and time.monotonic() < patience:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.long
def test_a_few_moments_of_real_kills(tmp_path: Path) -> None:
    """A sample of `python -m tests.kill`, which tries many."""
    code = "from tests import kill; kill.main()"
    arguments = ["--moments", 2, "--commands", "force", "--signals", "KILL,TERM"]
    done = in_another_process(code, *arguments, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["wrong"] == 0
