"""serve.sh, the chat template of a bundle, and the script that tries TensorRT-LLM, against the stand-in's trtllm-serve."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.checkpoints import MICRO
from tests.conftest import BuildBundle
from tests.targets.tensorrt_llm_stand_in import SITE
from vtexport.models import Prompter, read_spec
from vtexport.models.prompt import PROCESSOR_FILES, chat_template
from vtexport.targets.tensorrt_llm import deployment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "tensorrt_llm.sh"
#: bundles by the names that the script gives them
BUNDLES: dict[str, tuple[str, float, str]] = {
    "pruned": ("sparsevlm", 0.44, "tensorrt-llm"),
    "fastervlm": ("fastervlm", 0.44, "tensorrt-llm"),
    "dense": ("dense", 1.0, "tensorrt-llm"),
    "pruned-onnxruntime": ("sparsevlm", 0.44, "onnxruntime"),
    "fastervlm-onnxruntime": ("fastervlm", 0.44, "onnxruntime"),
}


def program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with TensorRT-LLM's programs, and a Python with it and with transformers 4, as its metadata say."""
    folder, said = tmp_path / "bin", tmp_path / "metadata" / "transformers-4.57.3.dist-info"
    said.mkdir(parents=True)
    (said / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.3\n")
    program(folder, "python3", f'PYTHONPATH="{said.parent}:{SITE}" exec "{sys.executable}" "$@"')
    stand_in = "tests.targets.tensorrt_llm_stand_in.trtllm_serve"
    program(folder, "trtllm-serve", f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -m {stand_in} "$@"')
    return folder


@pytest.fixture
def bundles(build_bundle: BuildBundle, tmp_path: Path) -> Callable[..., Path]:
    """A folder with links to bundles."""

    def get(*names: str) -> Path:
        folder = tmp_path / "bundles"
        folder.mkdir()
        for name in names:
            method, keep, target = BUNDLES[name]
            (folder / name).symlink_to(build_bundle(MICRO, keep, method, target=target, self_check=False))
        return folder

    return get


def with_path(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **more}


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that no one listens on."""
    for first in range(20000 + os.getpid() % 9000, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no ports")


@pytest.fixture(scope="module")
def client() -> Iterator[ModuleType]:
    """The client, as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "tensorrt_llm_client.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


# --- serve.sh -------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "serve.sh"
    path.parent.mkdir()
    path.write_text(deployment._SERVE)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        ((), "exit 0", "give the folder of the LLaVA checkpoint: serve.sh LLAVA_CHECKPOINT [options of trtllm-serve]"),
        (("nothing-there",), "exit 0", "give the folder of the LLaVA checkpoint"),
        (("--port", "8000"), "exit 0", "give the folder of the LLaVA checkpoint"),
        ((MICRO,), "echo ModuleNotFoundError >&2; exit 1", "TensorRT-LLM's Python has no vtexport; install it there"),
    ],
)
def test_serve_says_in_one_line_what_it_needs(
    arguments: tuple[object, ...], python: str, message: str, serve: Path, tmp_path: Path
) -> None:
    program(tmp_path / "bin", "python3", python)
    program(tmp_path / "bin", "trtllm-serve", "echo called")
    command = [serve, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_path(tmp_path / "bin"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_serve_passes_the_bundle_and_the_users_options_on(serve: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin", "python3", "exit 0")
    program(tmp_path / "bin", "trtllm-serve", "printf '%s\\n' \"$@\"")
    spaced = tmp_path / "a checkpoint"
    spaced.mkdir()
    (spaced / "config.json").write_text("{}")
    command = [serve.name, spaced, "--port", "8001", "--log_level", "a b"]
    done = subprocess.run(
        ["bash", *command],
        capture_output=True,
        text=True,
        check=True,
        env=with_path(tmp_path / "bin"),
        cwd=serve.parent,
    )
    here = str(serve.parent)
    assert done.stdout.splitlines() == [
        *(str(spaced), "--backend", "pytorch", "--custom_module_dirs", f"{here}/vtexport_llava"),
        *("--chat_template", f"{here}/vtexport_llava/chat_template.jinja"),
        *("--extra_llm_api_options", f"{here}/options.yaml", "--port", "8001", "--log_level", "a b"),
    ]


def test_an_option_that_trtllm_serve_does_not_know_is_refused_by_it(programs: Path, serve: Path) -> None:
    command = [serve, MICRO, "--no_such_option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_path(programs))
    assert done.returncode == 2
    assert "unrecognized arguments: --no_such_option" in done.stderr


# --- the chat template ----------------------------------------------------------------------------------------------

#: takes the content of a message as a list of parts alone, as LLaVA-1.5's own does
PARTS = """\
{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>
{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


@pytest.mark.parametrize("template", ["own", "parts"])
@pytest.mark.parametrize("question", ["what digit is red?", "two\nlines, and {{ braces }}?"])
def test_the_template_writes_a_string_and_parts_alike(template: str, question: str, tmp_path: Path) -> None:
    """TensorRT-LLM 1.2 gives a string with the mark in it, later versions a list where the template takes one."""
    for name in PROCESSOR_FILES:
        if (MICRO / name).is_file():
            shutil.copy(MICRO / name, tmp_path)
    if template == "parts":
        (tmp_path / "chat_template.jinja").write_text(PARTS)
    prompter = Prompter(tmp_path, read_spec(MICRO))
    text = prompter.prompt(question).text
    assert text == f"USER: <image>\n{question} ASSISTANT:"
    served = deployment._STRING_CONTENT + chat_template(tmp_path)
    for content in (f"<image>\n{question}", [{"type": "image"}, {"type": "text", "text": question}]):
        made = prompter.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=served, add_generation_prompt=True, tokenize=False
        )
        assert made == text


# --- a checkpoint in the older form ---------------------------------------------------------------------------------


def test_a_checkpoint_of_transformers_5_gets_the_older_form(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    command = [sys.executable, ROOT / "benchmarks" / "tensorrt_llm_client.py", "older", MICRO, tmp_path / "old"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'old'}\n"
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert "rope_parameters" not in config["text_config"]
    assert (config["text_config"]["rope_theta"], config["torch_dtype"], config["image_token_index"]) == (
        50000.0,
        "float16",
        4,
    )
    tokenizer = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"extra_special_tokens", "backend", "processor_class"} & set(tokenizer)
    assert "image_processor" not in json.loads((tmp_path / "old" / "processor_config.json").read_text())
    assert (tmp_path / "old" / "model.safetensors").samefile(MICRO / "model.safetensors")
    # The same model is read, and nothing of the original was touched.
    old, new = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "old", MICRO))
    assert old.text_config.rope_parameters == new.text_config.rope_parameters
    old, new = (AutoTokenizer.from_pretrained(folder)("what digit is red?") for folder in (tmp_path / "old", MICRO))
    assert old["input_ids"] == new["input_ids"]
    old, new = (AutoImageProcessor.from_pretrained(folder) for folder in (tmp_path / "old", MICRO))
    assert old.size == new.size
    again = subprocess.run([*command[:3], tmp_path / "old", tmp_path / "x"], capture_output=True, text=True, check=True)
    assert again.stdout == f"{tmp_path / 'old'}\n"
    assert "rope_parameters" in (MICRO / "config.json").read_text()


# --- the client and the script --------------------------------------------------------------------------------------


def test_a_report_of_other_tokens_fails(client: ModuleType, micro_runner, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.jsonl"
    for tokens, lines, said in (
        (36, 2, "PASS it: VTEXPORT_REPORT (2 lines, visual tokens 36)"),
        (144, 2, "FAIL it: VTEXPORT_REPORT: visual tokens by layer {0: 144}, the plan has {0: 36}"),
        (36, 1, "FAIL it: VTEXPORT_REPORT: 1 lines for 2 requests"),
    ):
        line = {"request": 1, "text": 12, "parts": [{"layer": 0, "visual_tokens": tokens}]}
        path.write_text((json.dumps(line) + "\n") * lines)
        client.check_report("it", micro_runner, path, 0, [12, 12])
        assert capsys.readouterr().out.startswith(said)
    client.check_counts("it", micro_runner, [client.Reply("a", 156), client.Reply("a", 48)], [12, 12])
    assert capsys.readouterr().out == "FAIL it: usage.prompt_tokens: [36, 144] visual tokens, the plan has 36\n"


def test_the_table_has_medians_and_ratios(client: ModuleType, tmp_path: Path) -> None:
    for name, first in (("dense", [100.0, 120.0, 90.0]), ("pruned", [50.0, 40.0, 60.0])):
        (tmp_path / name).write_text(json.dumps({"first_token": first, "per_token": [5.0, 5.0, 5.0]}))
    command = [sys.executable, ROOT / "benchmarks" / "tensorrt_llm_client.py", "table"]
    files = [tmp_path / "dense", tmp_path / "pruned"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    assert re.search(r"time to first token +100\.00 \(90\.00-120\.00\) +50\.00 \(40\.00-60\.00\) +2\.00x", done.stdout)


def run_script(programs: Path, bundles: Path, **more: str) -> tuple[int, list[str], Path]:
    """Exit code, lines, and the folder of logs of the script."""
    logs = programs.parent / "temporary"
    logs.mkdir()
    told = {"VTEXPORT": str(Path(sys.executable).parent / "vtexport"), "BUNDLES": str(bundles), "TMPDIR": str(logs)}
    told |= {"PORT": str(free_port(5)), "START_SECONDS": "300", "QUESTIONS": "4", "ROUNDS": "0"}
    done = subprocess.run(
        [SCRIPT], capture_output=True, text=True, check=False, env=with_path(programs, **{**told, **more})
    )
    # Nothing but the logs is left.
    (left,) = logs.iterdir()
    first, *lines = done.stdout.splitlines()
    assert first == f"logs: {left}", done.stderr
    return done.returncode, lines, left


def results(lines: list[str]) -> dict[str, str]:
    """PASS, FAIL or SKIP by what was tried, without what stands in brackets."""
    found = [re.match(r"(PASS|FAIL|SKIP) (.*?)(?: \(.*\))?$", line) for line in lines]
    return {one[2]: one[1] for one in found if one is not None}


def test_one_server_answers_as_our_own_graphs(programs: Path, bundles: Callable[..., Path], tmp_path: Path) -> None:
    """What the script asks first, without the rest of it."""
    folder, port = bundles("pruned", "pruned-onnxruntime"), free_port()
    url, report = f"http://127.0.0.1:{port}", tmp_path / "report.jsonl"
    client = [sys.executable, ROOT / "benchmarks" / "tensorrt_llm_client.py"]
    command = [folder / "pruned" / "serve.sh", MICRO, "--host", "127.0.0.1", "--port", str(port)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env=with_path(programs, VTEXPORT_REPORT=str(report))
        ) as server,
    ):
        try:
            subprocess.run([*client, "wait", url, str(server.pid), "300"], check=True)
            told = ["--name", "pruned", "--report", report, "--against", folder / "pruned-onnxruntime"]
            asked = [*client, "check", folder / "pruned", url, *told, "--held-out", "--questions", "4"]
            done = subprocess.run(asked, capture_output=True, text=True, check=True)
        finally:
            server.terminate()
    assert done.stdout.splitlines() == [
        "PASS pruned: answers as onnxruntime's (4 of 4)",
        "PASS pruned: usage.prompt_tokens (text and 144 visual tokens)",
        "PASS pruned: two at a time (4 answers as alone)",
        "PASS pruned: VTEXPORT_REPORT (8 lines, visual tokens 144 > 95 > 62 > 40)",
    ]
    assert "prompt: 'USER: <image>\\nwhat digit is" in (tmp_path / "log").read_text()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_the_script_passes_on_the_stand_in(programs: Path, bundles: Callable[..., Path]) -> None:
    code, lines, _ = run_script(programs, bundles(*BUNDLES), ROUNDS="1")
    found = results(lines)
    not_passed = [line for line in lines if line.startswith(("FAIL", "SKIP")) and not line.startswith("SKIP GPU")]
    assert (code, not_passed) == (0, [])
    sides = ("pruned", "fastervlm, images", "fastervlm, embeddings")
    each = ("answers as onnxruntime's", "usage.prompt_tokens", "two at a time", "VTEXPORT_REPORT")
    assert {f"{side}: {what}" for side in sides for what in each} <= set(found)
    assert {f"build {name}" for name in BUNDLES} | {f"serve {name}" for name in list(BUNDLES)[:3]} <= set(found)
    assert {f"{name} refuses enable_block_reuse" for name in ("pruned", "fastervlm")} <= set(found)
    assert {"versions", "contract", "latency"} <= set(found)
    assert re.match(r"time per token .*x$", lines[-1])
    assert "transformers 4.57.3" in lines[0]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_the_script_fails_on_a_server_that_answers_dense(programs: Path, bundles: Callable[..., Path]) -> None:
    folder = bundles(*BUNDLES)
    dense = {"STAND_IN_BUNDLE": str(folder / "dense"), "STAND_IN_FAULT": "no-embeds"}
    code, lines, _ = run_script(programs, folder, **dense)
    found = results(lines)
    assert code == 1
    assert "FAIL pruned: VTEXPORT_REPORT: visual tokens by layer {0: 144}, the plan has" in "\n".join(lines)
    assert "FAIL fastervlm, images: usage.prompt_tokens: [144] visual tokens, the plan has 63" in lines
    (embeddings,) = [line for line in lines if "embeddings" in line]
    assert embeddings.startswith("SKIP fastervlm, embeddings: this server takes no parts of type image_embeds")
    assert found["latency: ROUNDS is 0"] == "SKIP"


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_the_script_fails_where_nothing_can_be_served(programs: Path, tmp_path: Path) -> None:
    """With a serve.sh that ends at once in place of every bundle's."""
    (tmp_path / "bundles").mkdir()
    for name in BUNDLES:
        program(tmp_path / "bundles" / name, "serve.sh", "echo no GPU >&2; exit 1")
    code, lines, logs = run_script(programs, tmp_path / "bundles")
    assert code == 1
    assert f"FAIL serve pruned: the server ended; see {logs}/serve-pruned.log" in lines
    assert (logs / "serve-pruned.log").read_text() == "no GPU\n"
    assert any(
        line.startswith("FAIL fastervlm refuses enable_block_reuse: another message stands in") for line in lines
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing-there",), "nothing-there is no checkpoint; give a folder with config.json"),
        ((str(MICRO), "0.4", "0.5"), "too many arguments"),
    ],
)
def test_the_scripts_usage_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
