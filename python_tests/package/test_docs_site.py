"""The pages, as the repository shows them and as the site does: nothing is missing, and every link has its target.

`make docs` builds the site strictly, which checks links, anchors and references once more; `make lint` runs it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import grpo_kernels
import grpo_kernels.distributed
import grpo_kernels.testing
from bench import docs, docs_pictures
from python_tests.package.test_completeness import PACKAGES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/r1/README.md")
LINKED = [*OUTSIDE, *(f"docs/{page}" for page in PAGES)]
FENCED = re.compile(r"^ *(```+).*?^ *\1\s*?$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
SMALL = 60_000  # bytes


class _Settings(yaml.SafeLoader):
    """mkdocs.yml, whose references to Python objects say nothing here."""


_Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), _Settings)
    return loaded


def hook(name: str) -> dict[str, Any]:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs")
    return runpy.run_path(str(DOCS / "hooks" / name))


def _navigation(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry if isinstance(entry, list) else entry.values():
            yield from _navigation(part)


def _prose(path: str) -> str:
    return FENCED.sub("", (ROOT / path).read_text())


def _anchors(path: str) -> set[str]:
    """Of a page's headings, as GitHub forms them; the site's are the same."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


# --- links, as they are read in the repository ---------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKED)
def test_links_have_their_targets(page: str) -> None:
    missing = []
    for target in LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        meant = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        inside = meant.exists() and meant.is_relative_to(ROOT)
        if not inside or (anchor and anchor not in _anchors(meant.relative_to(ROOT).as_posix())):
            missing.append(target)
    assert missing == []
    assert "![](" not in _prose(page), "a picture without words"


def test_a_missing_anchor_is_seen() -> None:
    assert {"backends", "torchcompile-autocast-streams"} <= _anchors("docs/numerics.md")
    assert "backend" not in _anchors("docs/numerics.md")
    assert LINK.findall("[a](b.md#c), ![p](q.png), [`d`](e)") == ["b.md#c", "q.png", "e"]


# --- what the site has ---------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_once(settings: dict[str, Any]) -> None:
    guests = {"index.md", "contributing.md", "changelog.md", "examples/r1.md"}
    assert Counter(_navigation(settings["nav"])) == Counter([*PAGES, *guests])


def test_the_site_is_strict(settings: dict[str, Any]) -> None:
    levels = [level for group in settings["validation"].values() for level in group.values()]
    assert set(levels) == {"warn"}
    assert {"anchors", "not_found"} <= settings["validation"]["links"].keys()
    assert "omitted_files" in settings["validation"]["nav"]
    build = re.search(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert build
    assert build[0] == "mkdocs build --strict"  # with --quiet it does not count warnings
    assert re.search(r"^lint:.* docs\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _definitions(module: Any) -> Iterator[str]:
    for name in module.__all__:
        if name != "__version__":
            item = getattr(module, name)
            yield f"{item.__module__}.{item.__qualname__}"


def _directives(page: str) -> list[str]:
    return DIRECTIVE.findall((DOCS / "api" / page).read_text())


def test_every_public_name_is_in_the_api_once() -> None:
    wanted = [
        name
        for module in (grpo_kernels, grpo_kernels.distributed, grpo_kernels.testing)
        for name in _definitions(module)
    ]
    pages = [page.name for page in (DOCS / "api").glob("*.md") if page.name != "integrations.md"]
    assert Counter(name for page in pages for name in _directives(page)) == Counter(wanted)
    index = (DOCS / "api" / "index.md").read_text()
    assert [name for name in grpo_kernels.__all__ if f"`{name}`" not in index] == ["__version__"]


@pytest.mark.parametrize("adapter", ["liger", "transformers", "trl", "verl"])
def test_every_name_of_an_adapter_is_in_the_api(adapter: str) -> None:
    """By its source: the adapters import their trainers."""
    tree = ast.parse((ROOT / f"grpo_kernels/integrations/{adapter}/__init__.py").read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    functions = {name for name in ast.literal_eval(assigned["__all__"]) if not name.isupper()}
    named = {name.rpartition(".")[2] for name in _directives("integrations.md") if f".{adapter}." in name}
    assert named == functions - {"IncompatibleVersion"}


# --- the pages of the ops ------------------------------------------------------------------------------------------


def test_every_op_has_a_picture() -> None:
    assert sorted(docs_pictures.PAGES) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_pages_of_ops_have_every_part(package: str, settings: dict[str, Any]) -> None:
    text = (DOCS / f"{package}.md").read_text()
    assert re.search(r"^    \S.* = ", text, re.MULTILINE), "a formula"
    for part in ("Numerics", "(Sources|Presets)"):
        assert re.search(rf"^#+ {part}$", text, re.MULTILINE), part
    assert re.search(r"\]\(api/\w+\.md\)", text), "a link to the API"
    assert re.search(r"numerics\.md#errors|^## Errors|`ValueError`", text, re.MULTILINE), "errors"
    (group,) = [entry["Ops"] for entry in settings["nav"] if "Ops" in entry]
    assert f"{package}.md" in _navigation(group)


@pytest.mark.parametrize("package", PACKAGES)
def test_pictures_show_what_the_record_says(package: str) -> None:
    """The text beside them is one of the pages made from results, and tested with those."""
    shown = docs_pictures.path_of(package)
    assert not docs_pictures.stale(package, docs.results()), "run python -m bench.docs"
    assert shown.stat().st_size < SMALL
    head = (DOCS / f"{package}.md").read_text().split("```python")[0]
    assert re.search(rf"!\[Bars.+\]\(images/op_{package}\.png\)", head)


def test_a_picture_goes_stale_with_its_numbers() -> None:
    files = docs.results()
    record, op = next(iter(files.values())), "grpo_loss"
    before = docs_pictures.shown(op, files).stamp()
    case = next(case for case in record["cases"] if case["op"] == op)
    case["rows"]["ours"]["median_us"] *= 1.1
    assert docs_pictures.shown(op, files).stamp() != before
    assert docs_pictures.stale(op, files)


def test_pictures_take_first_cases_in_turn_and_prefer_a_gpu() -> None:
    def case(op: str, name: str, **more: Any) -> dict[str, Any]:
        ours = {"kind": "ours", "median_us": 10.0, "extra_bytes": 2**20}
        eager = {"kind": "eager", "median_us": 40.0, "extra_bytes": 2**22, "accuracy": "off"}
        return {"op": op, "case": name, "rows": {"ours, in place": ours, "eager": eager}, **more}

    machine = {"device": "toaster", "torch": "2.13.0+cpu", "threads": 2}
    cases = [case("fp8_dequantize", "a"), *(case("fp8_quantize", str(i)) for i in range(8))]
    cases.insert(1, case("fp8_quantize", "a call", clock="host"))
    files = {"a.json": {"machine": machine, "cases": cases}}
    shown = docs_pictures.shown("fp8_quantize", files)
    first = ["fp8_quantize 0", "fp8_dequantize a", "fp8_quantize 1"]
    assert [case.label for case in shown.cases][:3] == [f"{name}, in place" for name in first]
    assert len(shown.cases) == 5
    assert [(bar.kind, bar.share, bar.text) for bar in shown.cases[0].time] == [
        ("ours", 0.25, "10 us"),
        ("eager", 1.0, "40 us*"),
    ]
    assert [(bar.share, bar.text) for bar in shown.cases[0].memory] == [(0.25, "1.0 MiB"), (1.0, "4.0 MiB")]
    words = docs_pictures.text("fp8_quantize", files)
    assert "ours takes 0.25 of the time of eager PyTorch and 0.25 of its memory" in words
    assert "toaster, PyTorch 2.13.0, 2 threads" in words
    assert "* misses the accuracy budget" in " ".join(words.split())
    files["b.json"] = {"machine": {**machine, "device": "GPU", "cuda": "13.0"}, "cases": cases}
    assert docs_pictures.shown("fp8_quantize", files).name == "b.json"
    with pytest.raises(ValueError, match="no record has a timed case of grpo_loss"):
        docs_pictures.shown("grpo_loss", files)


# --- hooks of the site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "link", "target"),
    [
        ("docs/trl.md", "trainers.md#skyrl", "trainers.md#skyrl"),
        ("docs/moe.md", "../examples/r1/README.md#drafts", "examples/r1.md#drafts"),
        ("docs/api/loss.md", "../grpo_loss.md", "../grpo_loss.md"),
        ("README.md", "docs/images/r1_curves.png", "images/r1_curves.png"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("examples/r1/README.md", "../../docs/moe.md", "../moe.md"),
        ("README.md", "LICENSE", None),
        ("docs/kernels.md", "../bench/floors", None),
    ],
)
def test_links_of_the_site(path: str, link: str, target: str | None) -> None:
    assert hook("pages.py")["served"](path, link)[0] == target


def test_links_into_the_repository() -> None:
    served = hook("pages.py")["served"]
    assert served("README.md", "LICENSE", "https://example.org/r/")[0] == "https://example.org/r/blob/main/LICENSE"
    folder = served("docs/kernels.md", "../bench/floors", "https://example.org/r")[0]
    assert folder == "https://example.org/r/tree/main/bench/floors"


def test_a_link_to_nothing_fails_the_site() -> None:
    from_pages = hook("pages.py")
    for target in ("nothing.md", "../../elsewhere.md"):
        with pytest.raises(from_pages["PluginError"], match="no file is at the link"):
            from_pages["served"]("docs/trl.md", target)


def test_code_is_not_taken_for_links() -> None:
    text = "[a](b)\n```python\n[c](d)\n```\n`[e](f)` ``g` [h](i)`` [`j`](k)\n"
    changed = hook("pages.py")["outside_code"](text, lambda match: f"<{match['target']}>")
    assert changed == "<b>\n```python\n[c](d)\n```\n`[e](f)` ``g` [h](i)`` <k>\n"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed: make docs")
    as_markdown = hook("docstrings.py")["as_markdown"]
    assert as_markdown("With z::\n\n    a = b\n\n::\n\n    c") == "With z:\n\n    a = b\n\n    c"
    assert as_markdown("Args:\n    softcap: > 0, or None.") == "Args:\n    softcap: \\> 0, or None."


def test_fields_of_named_tuples_have_types(tmp_path: Path) -> None:
    """Their sources have no signature; the hook takes the types from the class's own annotations."""
    griffe = pytest.importorskip("griffe", reason="griffe is not installed: make docs")
    (tmp_path / "tuples").mkdir()
    (tmp_path / "tuples" / "__init__.py").write_text(
        'class Pair(NamedTuple):\n    """Two.\n\n    Args:\n        first: > 0.\n    """\n\n    first: int | None\n'
    )
    extensions = griffe.load_extensions(hook("docstrings.py")["Docstrings"])
    package = griffe.load("tuples", search_paths=[tmp_path], extensions=extensions, docstring_parser="google")
    (field,) = package["Pair"].docstring.parsed[-1].value
    assert (str(field.annotation), field.description) == ("int | None", "\\> 0.")


def test_docs_speak_of_modules_that_exist() -> None:
    """`python -m x.y` in a page can be run."""
    texts = "".join(_prose(page) for page in LINKED)
    named = set(re.findall(r"`python -m ((?:bench|examples)[\w.]*)", texts))
    assert {"bench", "bench.docs", "bench.tune"} <= named
    for name in named:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{name}.__main__"), name


# --- the contributor's side ----------------------------------------------------------------------------------------


def test_pre_commit_runs_the_pinned_programs() -> None:
    """Those that the Makefile's lint runs, where requirements-dev.txt puts them."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    entries = [hook["entry"].split()[0] for hook in config["repos"][0]["hooks"]]
    lint = re.search(r"^lint:.*\n(?:\t.*\n)+", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    programs = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[0]))
    assert {entry.removeprefix(".venv/bin/") for entry in entries} == programs == {"ruff", "mypy", "clang-format"}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert programs <= set(pinned)


def test_the_changelog_keeps_its_shape() -> None:
    """Newest first, one heading a version, the version of the package among them."""
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert all(re.fullmatch(r"(Unreleased|\d+\.\d+\.\d+ \((unreleased|\d{4}-\d\d-\d\d)\))", name) for name in versions)
    numbers = [tuple(map(int, re.findall(r"\d+", name)[:3])) for name in versions if name != "Unreleased"]
    assert numbers == sorted(set(numbers), reverse=True)
    assert grpo_kernels.__version__.partition("+")[0] in {name.split()[0] for name in versions}


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:6] == ["Apache", "License", "Version", "2.0,", "January", "2004"]
    assert re.findall(r"^ +(\d)\. [A-Z]", text, re.MULTILINE) == list("123456789")
    assert "END OF TERMS AND CONDITIONS" in text
