"""The documentation: tables, links, commands, flags, Python code and the picture are held to what they speak of."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from vtexport.cli.main import cli
from vtexport.pruning import METHODS
from vtexport.targets import TARGETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "exporter" / "vtexport"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README,
    *DOCS,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "engines" / "micro-llava" / "README.md",
]
#: folders of the repository, by which a path in the text is known
FOLDERS = ("exporter", "tests", "plugins", "benchmarks", "engines", "docs")
#: flags of other programs that pages name
FOREIGN_FLAGS = {
    "--backend-config",
    "--check",
    "--config",
    "--enable-mm-embeds",
    "--extra_llm_api_options",
    "--geometry",
    "--guided",
    "--ignore-scripts",
    "--json",
    "--kv_cache_free_gpu_memory_fraction",
    "--max_multimodal_len",
    "--max_num_tokens",
    "--no-deps",
    "--prefix",
    "--target",
}

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def loaded(path: Path) -> ModuleType:
    """The script at `path`, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


tables = loaded(ROOT / "benchmarks" / "tables.py")
architecture = loaded(ROOT / "docs" / "architecture.py")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language and text of every code block, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], found[2]
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?:\A|\n\n)((?:    .*(?:\n|\Z))+)", rest):
        yield "", re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(\A|\n\n)(    .*(\n|\Z))+", "\n\n", text)


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`]+)`", prose(page))


def commands(text: str) -> list[list[str]]:
    """The vtexport commands of a code block, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("vtexport ")]


def command_of(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"vtexport has no command {name}"
    return found


def flags_of(name: str) -> set[str]:
    """Every spelling of every flag of a command."""
    found = {"--help"}
    for parameter in command_of(name).params:
        found |= {flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("-")}
    return found


def parse(words: list[str]) -> dict[str, object]:
    """The parameters of a command, parsed as the command line does; nothing is invoked.

    Raises:
        click.UsageError: the command does not parse.
    """
    name, *arguments = words
    parent = click.Context(cli, info_name="vtexport")
    with command_of(name).make_context(name, arguments, parent=parent) as context:
        return dict(context.params)


# Tables


def test_tables_are_what_the_results_say() -> None:
    assert not tables.outdated(), "run python benchmarks/tables.py"


def test_a_table_that_was_edited_is_noticed() -> None:
    results = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    edited = text.replace("99.4%", "99.9%", 1)
    assert edited != text
    assert tables.rendered(edited, results) == text


def test_every_table_stands_somewhere_and_every_result_is_shown() -> None:
    used = {found["name"] for page in tables.pages() for found in tables.BLOCK.finditer(page.read_text("utf-8"))}
    assert used == set(tables.TABLES)
    opened = sum(page.read_text("utf-8").count("<!-- table:") for page in tables.pages())
    closed = sum(len(tables.BLOCK.findall(page.read_text("utf-8"))) for page in tables.pages())
    assert opened == closed, "a block has no end"


def test_measurements_agree_wherever_they_were_recorded_twice() -> None:
    results = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    main = tables.accuracy_points(results)
    plain = [point for point in results["sparsevlm_options"]["result"]["points"] if not point["options"]]
    plain += [point for point in results["quantized"]["result"]["points"] if point["weights"] == "fp32"]
    plain += [
        point for point in results["selection"]["result"]["points"] if "accuracy" in point and not point["options"]
    ]
    known = [
        (point, main[point["method"], point["keep"]]) for point in plain if (point["method"], point["keep"]) in main
    ]
    assert len(known) >= 4
    for point, other in known:
        assert tables.percent(point["accuracy"]) == tables.percent(other["accuracy"]), point


def test_every_result_says_when_and_how_it_was_measured() -> None:
    for name, section in json.loads(tables.RESULTS.read_text(encoding="utf-8")).items():
        assert {"date", "script", "machine", "versions"} <= set(section["about"]), name


# Text


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def anchor(heading: str) -> str:
    """The anchor that a forge gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), link
        assert not place or place in anchors(target), link


@by_name
def test_files_that_a_page_names_exist(page: Path) -> None:
    for span in spans(page):
        path = re.fullmatch(rf"(?:python )?((?:{'|'.join(FOLDERS)})/[\w./-]*)(?: .*)?", span)
        if path is not None and not path[1].startswith("engines/builds"):
            assert (ROOT / path[1]).exists(), span


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


# Commands


@pytest.fixture
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_an_empty_folder")
@by_name
def test_commands_parse(page: Path) -> None:
    for _, text in blocks(page):
        for words in commands(text):
            try:
                parameters = parse(words)
            except click.UsageError as error:
                # Files that a page speaks of need not be there.
                if isinstance(error, click.BadParameter) and "does not exist" in error.message:
                    continue
                pytest.fail(f"vtexport {shlex.join(words)}: {error.format_message()}")
            for key, known in (("method", METHODS), ("target", TARGETS)):
                if isinstance(parameters.get(key), str):
                    assert set(str(parameters[key]).split("+")) <= set(known), words


@pytest.mark.usefixtures("_in_an_empty_folder")
def test_commands_that_do_not_parse_are_noticed() -> None:
    assert commands("vtexport run m \\\n  --json  # why\nls\n") == [["run", "m", "--json"]]
    for words in (
        ["build", "--model", "micro-llava", "--no-such-flag"],
        ["build", "--keep", "0.25"],
        ["show", "micro"],
    ):
        with pytest.raises(click.UsageError):
            parse(words)


def test_the_pages_have_commands_to_check() -> None:
    found = [words[0] for page in PAGES for _, text in blocks(page) for words in commands(text)]
    assert set(found) == {
        "build",
        "calibrate",
        "run",
        "show",
        "profile",
        "eval",
        "inspect",
        "list",
        "doctor",
        "serve",
        "deploy",
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_flags_and_commands_in_the_text_exist(page: Path) -> None:
    """The changelog may name what is gone."""
    every = set().union(*(flags_of(name) for name in cli.list_commands(click.Context(cli))))
    for span in spans(page):
        words = span.split()
        if words[0] == "vtexport" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            named = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert named <= flags_of(words[1]), span
        elif words[0].startswith("--"):
            named = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert named <= every | FOREIGN_FLAGS, span


def test_every_flag_of_build_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS)
    missing = [flag for flag in sorted(flags_of("build")) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]
    assert set(missing) <= {"--help", "-h"}


def test_every_method_and_target_is_documented() -> None:
    methods = tables.BLOCK.sub("", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))
    assert [name for name in METHODS if f"| `{name}` |" not in methods] == []
    pages = "\n".join(
        page.read_text(encoding="utf-8") for page in DOCS if page.stem.startswith(("tensorrt", "openvino", "glossary"))
    )
    assert [name for name in TARGETS if f"`{name}`" not in pages] == []


# Python code


@by_name
def test_python_code_compiles_and_imports_what_exists(page: Path) -> None:
    for language, text in blocks(page):
        if language != "python":
            continue
        compile(text, str(page), "exec")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vtexport":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


# What takes longer


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which the pages' commands find the repository's images, and may write."""
    (tmp_path / "engines").symlink_to(ROOT / "engines", target_is_directory=True)
    return tmp_path


def ran(command: list[str], folder: Path) -> str:
    """What a program that succeeds writes to stdout."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


def test_the_first_engine_is_built_as_its_page_says(vtexport, checkout: Path) -> None:
    text = (ROOT / "docs" / "first-engine.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- tested: .*? -->\n```sh\n(.*?)```", text, re.DOTALL)
    said: dict[str, str] = {}
    for words in commands(block):
        outcome = vtexport(*words)
        assert outcome.code == 0, f"vtexport {shlex.join(words)}\n{outcome.err}"
        said[words[0]] = outcome.out
    assert list(said) == ["build", "run", "show", "profile", "eval", "inspect"]
    assert said["run"] == "7\n"
    assert (checkout / "kept.png").is_file()
    # The README shows what this very build prints.
    (transcript,) = re.findall(r"<!-- transcript -->\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [" ".join(line.split()) for line in said["build"].splitlines()]
    for line in transcript.splitlines():
        beginning = " ".join(line.partition("…")[0].split())
        assert any(one.startswith(beginning) for one in lines), line


@pytest.mark.parametrize("name", [pytest.param("first-engine.md", marks=pytest.mark.long), "python-api.md"])
def test_the_first_python_example_runs(name: str, checkout: Path) -> None:
    example = next(text for language, text in blocks(ROOT / "docs" / name) if language == "python")
    assert "7" in ran([sys.executable, "-c", example], checkout)


# Architecture


def defined(path: Path) -> set[str]:
    """Functions and classes of a module, and the methods of its classes as Class.method."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}
    inner = {f"{name}.{part.name}" for name, node in found.items() for part in node.body if isinstance(part, kinds)}
    return set(found) | inner


def test_the_picture_is_what_the_imports_draw() -> None:
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw(), "run python docs/architecture.py"


def test_imports_that_run_in_a_circle_are_noticed() -> None:
    with pytest.raises(SystemExit, match="a -> b -> a"):
        architecture.depths({"a": {"b"}, "b": {"a"}})


def test_every_module_is_described() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`: \S", page, re.MULTILINE)
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    problems = {
        "not described": sorted(modules - set(listed)),
        "described but not there": sorted(set(listed) - modules),
        "described twice": sorted({name for name in listed if listed.count(name) > 1}),
    }
    found = [f"{what}: {' '.join(names)}" for what, names in problems.items() if names]
    if found:
        pytest.fail("docs/architecture.md: " + "; ".join(found), pytrace=False)


def test_the_functions_on_the_way_exist() -> None:
    page = ROOT / "docs" / "architecture.md"
    named = [span.split("::") for span in spans(page) if "::" in span]
    assert len(named) >= 16
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (PACKAGE / path).is_file() or name not in defined(PACKAGE / path)
    ]
    assert missing == []
