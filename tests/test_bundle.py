"""The engine folder: whole or not at all, and opened only if it is what its manifest says."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import MICRO
from tests.conftest import noise_images
from vtexport.builder.build import build
from vtexport.builder.options import BuildOptions
from vtexport.bundle import writing
from vtexport.bundle.folder import Bundle
from vtexport.bundle.manifest import MANIFEST
from vtexport.bundle.writing import check_destination, write_folder
from vtexport.errors import BundleError, InputError, StorageError, VerificationError
from vtexport.runtime.runner import Runner

DATA = Path(__file__).parent / "data"


def edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def siblings(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir()}


def test_a_copy_elsewhere_runs(bundle_copy: Path, photo: Path) -> None:
    from PIL import Image

    answer = Runner.open(bundle_copy).ask([(Image.open(photo), "how many digits are there?")])[0]
    assert answer.text in ("2", "3", "4")


def test_a_bundle_of_before_answers_as_it_did() -> None:
    """Built by an earlier vtexport of the same schema version, which also gave these answers."""
    known = json.loads((DATA / "bundle-schema-6-answers.json").read_text())
    opened = Bundle.open(DATA / "bundle-schema-6")
    opened.verify(lambda _bytes: None)
    images = noise_images(known["images"]["count"], seed=known["images"]["seed"])
    answers = Runner(opened).ask(list(zip(images, known["prompts"], strict=True)), known["max_new_tokens"])
    found = [
        {"text": one.text, "token_ids": one.token_ids, "kept": [stage.index for stage in one.stages]} for one in answers
    ]
    assert found == known["answers"]


def test_the_manifest_is_the_plan_and_lists_every_file(micro_bundle: Path) -> None:
    opened = Bundle.open(micro_bundle)
    plan = opened.manifest.pruning_plans()[0]
    assert (plan.method, plan.vision_tokens, plan.num_visual_tokens) == ("fastervlm", 36, 144)
    listed = {entry.path for entry in opened.manifest.files} | {MANIFEST}
    assert listed == {p.relative_to(micro_bundle).as_posix() for p in micro_bundle.rglob("*") if p.is_file()}
    language = opened.manifest.graphs["language"]
    named = {port.name: port.shape for port in language.inputs}
    assert list(named)[:4] == ["input_ids", "image_position", "text_length", "visual"]
    assert named["visual"] == ["batch", "visual", 128]
    assert named["past.11.value"] == ["batch", 2, "capacity_11", 32]
    verification = opened.manifest.verification
    assert verification is not None
    assert verification.same_kept
    assert verification.same_tokens
    assert verification.max_logit_error < 1e-4
    opened.verify(lambda _bytes: None)


def test_another_schema_version_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, schema_version=99)
    with pytest.raises(BundleError, match="schema version 99, this vtexport reads version 6"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "changes",
    [{"plans": None}, {"surprise": 1}, {"files": [{"path": 3}]}, {"debug": "yes"}],
    ids=["null", "unknown-field", "wrong-type", "string-for-bool"],
)
def test_a_damaged_manifest_is_refused(bundle_copy: Path, changes: dict[str, object]) -> None:
    edit(bundle_copy, **changes)
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(bundle_copy)


def test_a_plan_that_contradicts_itself_is_refused(bundle_copy: Path) -> None:
    plans = json.loads((bundle_copy / MANIFEST).read_text())["plans"]
    plans[0]["stages"][0]["kept"] = 1000
    edit(bundle_copy, plans=plans)
    with pytest.raises(BundleError, match="impossible stage"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": "1"}'])
def test_a_manifest_that_is_none_is_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="is not a vtexport manifest"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "engine/../../outside"])
def test_a_manifest_cannot_lead_out_of_its_folder(bundle_copy: Path, path: str) -> None:
    files = json.loads((bundle_copy / MANIFEST).read_text())["files"]
    edit(bundle_copy, files=[*files, {"path": path, "bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(BundleError, match="a path outside the bundle"):
        Bundle.open(bundle_copy)


def test_missing_resized_and_changed_files_are_found(bundle_copy: Path) -> None:
    weights = bundle_copy / "engine" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights.safetensors was changed since the build"):
        Bundle.open(bundle_copy).verify(lambda _bytes: None)
    weights.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        Bundle.open(bundle_copy)
    weights.unlink()
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(bundle_copy)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nowhere")


def test_an_existing_bundle_needs_force_and_is_replaced_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = BuildOptions(str(tiny_checkpoint), 0.4, self_check=False)
    build(options, out)
    before = (out / MANIFEST).read_bytes()
    with pytest.raises(InputError, match="--force"):
        build(options, out)
    assert (out / MANIFEST).read_bytes() == before
    other = build(BuildOptions(str(tiny_checkpoint), 0.5, self_check=False), out, force=True)
    assert other.manifest.plans[0].keep == 0.5
    assert siblings(out) == {"bundle"}


def test_two_builds_are_the_same_to_the_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(str(tiny_checkpoint), 0.4, self_check=False)
    one, two = (build(options, tmp_path / name).manifest.files for name in ("one", "two"))
    assert one == two


def test_the_old_bundle_survives_a_failed_rebuild(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    build(BuildOptions(str(tiny_checkpoint), 0.4, self_check=False), out)
    before = (out / MANIFEST).read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise VerificationError("the engine differs")

    monkeypatch.setattr("vtexport.builder.selfcheck.compare_engine", fail)
    with pytest.raises(VerificationError):
        build(BuildOptions(str(tiny_checkpoint), 0.5), out, force=True)
    assert (out / MANIFEST).read_bytes() == before
    assert siblings(out) == {"bundle"}


def test_a_wrong_engine_fails_the_build_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference, on tensors, keeps other patches than the engine, traced on stand-ins: as if a graph were wrong.
    import torch

    from vtexport.pruning import ops

    real = ops.token_select

    # Named as the op is, by which the tracer knows it.
    @functools.wraps(real)
    def wrong(hidden: torch.Tensor, score: torch.Tensor, keep: int):
        return real(hidden, -score if isinstance(score, torch.Tensor) else score, keep)

    monkeypatch.setattr(ops, "token_select", wrong)
    with pytest.raises(VerificationError, match="keeps other visual tokens than the reference"):
        build(BuildOptions(str(tiny_checkpoint), 0.4, "fastervlm"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_wrong_logits_fail_the_build(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtexport.check.reference import ReferenceAnswer, ReferenceModel

    real = ReferenceModel.answer

    def shifted(*args: object, **given: object) -> ReferenceAnswer:
        found = real(*args, **given)
        return replace(found, logits=found.logits + 0.5)

    monkeypatch.setattr(ReferenceModel, "answer", shifted)
    with pytest.raises(VerificationError, match="logits differ"):
        build(BuildOptions(str(tiny_checkpoint), 0.4), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"needs about .* but .* has 1.0 kB free"):
        build(BuildOptions(str(tiny_checkpoint), 0.4), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with write_folder(tmp_path / "bundle") as folder:
            (folder / "half").write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device; free some space"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_bundles_only(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    check_destination(folder, force=False)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no bundle"):
        check_destination(folder, force=True)
    with pytest.raises(InputError, match="is a file"):
        check_destination(folder / "thesis.txt", force=True)


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is not a writable folder"):
        check_destination(tmp_path / "file" / "bundle", force=False)
    with pytest.raises(StorageError, match="is not a writable folder"):
        check_destination(Path("/proc/vtexport/bundle"), force=False)


def test_the_dense_twin_is_the_dense_model(micro_bundle: Path, build_bundle, tmp_path: Path) -> None:
    from vtexport.builder.build import build_dense_twin

    twin = build_dense_twin(Bundle.open(micro_bundle), tmp_path / "dense")
    dense = Bundle.open(build_bundle(MICRO, 1.0, "dense"))
    assert {e.path: e.sha256 for e in twin.manifest.files} == {e.path: e.sha256 for e in dense.manifest.files}
    with pytest.raises(InputError, match="is dense itself"):
        build_dense_twin(dense, tmp_path / "again")
