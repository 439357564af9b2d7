"""Makes the quickstart's instruction set: what the standard library's functions and classes do.

What: reads the standard library of the Python that runs it with `ast`, takes the first sentence of each
public object's docstring as an answer, and asks for it by the object's name and signature. Rows are
`prompt_completion`:

    {"prompt": "### Question: What does `textwrap.dedent(text)` do?\\n### Answer:",
     "completion": " Remove any common leading whitespace from every line in `text`."}

Why: real text under a licence that lets us carry it, which every machine with Python can derive again. The
form of the prompt occurs nowhere in what `make_model.py` pre-trains on: fine-tuning has something to teach.

How long: some five seconds. What it gives up: the rows depend on the Python version (those we carry are from
3.11), and what only C code documents is not there.

The split: the answers whose hash is smallest are held out; whatever comes near to one of them, or quotes it,
is no training row. `make_model.py` keeps them out of the pre-training text by the same rule, `HeldOut`.
"""

import argparse
import ast
import copy
import hashlib
import inspect
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_DIRECTORIES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"}
SKIPPED_FILES = re.compile(r"_sysconfigdata|_casefix|stringprep|entities|topics|this|antigravity|__hello__")
HELDOUT_ROWS = 200
NEAR = 0.5  # two sentences that share this much of their words (Jaccard) count as the same
MAX_SIGNATURE = 80  # characters; a longer one becomes `(...)`
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Row:
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"### Question: {self.question}\n### Answer:"

    @property
    def completion(self) -> str:
        return f" {self.answer}"

    def as_json(self) -> str:
        return json.dumps({"prompt": self.prompt, "completion": self.completion}, ensure_ascii=False)


class HeldOut:
    """The hold-out rule: tells which texts give a held-out answer away."""

    def __init__(self, rows: list[Row]):
        self.texts = [f" {normal(row.answer)} " for row in rows]
        self.word_sets = [set(text.split()) for text in self.texts]

    def is_near(self, sentence: str) -> bool:
        """Is the sentence a held-out answer, or nearly?"""
        words = set(normal(sentence).split())
        return any(len(words & held) >= NEAR * len(words | held) for held in self.word_sets)

    def is_quoted_in(self, text: str) -> bool:
        """Does the text hold an answer word for word, whatever its case, line breaks and punctuation?"""
        words = f" {normal(text)} "
        return any(held in words for held in self.texts)

    def is_revealed_by(self, docstring: str) -> bool:
        return self.is_near(first_sentence(docstring) or "") or self.is_quoted_in(docstring)


def normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def source_files() -> Iterator[tuple[str, str]]:
    """(module, source) of each file of the standard library that people write and read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_DIRECTORIES.isdisjoint(inside.parts) and not SKIPPED_FILES.match(path.stem):
            module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
            yield module, path.read_text(encoding="utf-8")


def documented(node: ast.AST, name: str, parent: ast.AST | None = None) -> Iterator[tuple]:
    """(dotted name, node, the node it is defined in) of each object with a docstring, from `node` down."""
    if isinstance(node, Documented):
        if ast.get_docstring(node):
            yield name, node, parent
        parent = node
    for child in ast.iter_child_nodes(node):
        child_name = f"{name}.{child.name}" if isinstance(child, Documented) else name
        yield from documented(child, child_name, parent)


def heading(name: str, node: Documented, parent: ast.AST | None) -> str:
    """How the object is written in a question, or above its docstring: `textwrap.dedent(text)`."""
    if isinstance(node, ast.Module):
        return name
    if isinstance(node, ast.ClassDef):
        return f"{name}({', '.join(map(ast.unparse, node.bases))})"
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(arguments)
    if isinstance(parent, ast.ClassDef):
        text = re.sub(r"^(self|cls)(, /)?(, |$)", "", text)
    return f"{name}({text})" if len(text) <= MAX_SIGNATURE else f"{name}(...)"


def first_sentence(docstring: str) -> str | None:
    """The docstring's summary where it is a plain English sentence of 20 to 160 characters, else None."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    sentence = re.split(r"(?:(?<=\w\w[.])|(?<=[)`'\"][.]))\s+(?=[A-Z`'\"(])", paragraph)[0]
    if not 20 <= len(sentence) <= 160 or not re.match(r"[A-Z][a-z]*[ -]", sentence):
        return None
    if re.search(r"->|>>>|@|:\w+:|\bXXX|\bTODO|Usage|[=<>{}|\\*]|\.\.\.|:$", sentence):
        return None
    words = sentence.split()
    plain = sum(bool(re.fullmatch(r"[A-Za-z'-]+[.,]?", word)) for word in words)
    if len(words) < 4 or plain < 0.7 * len(words):
        return None
    return sentence if sentence.endswith(".") else f"{sentence}."


def question(name: str, node: Documented, parent: ast.AST | None) -> str:
    if isinstance(node, ast.ClassDef):
        return f"What is the class `{heading(name, node, parent)}`?"
    return f"What does `{heading(name, node, parent)}` do?"


def all_rows() -> list[Row]:
    """One row per answer, the first object in file order that gives it; sorted by the answers' hashes."""
    rows: dict[str, Row] = {}
    for module, source in source_files():
        for name, node, parent in documented(ast.parse(source), module):
            is_public = not any(part.startswith("_") for part in name.split("."))
            if isinstance(node, ast.Module) or isinstance(parent, Function) or not is_public:
                continue
            answer = first_sentence(ast.get_docstring(node))
            if answer and normal(answer) not in rows:
                rows[normal(answer)] = Row(question(name, node, parent), answer)
    by_hash = sorted(rows, key=lambda answer: hashlib.sha256(answer.encode()).hexdigest())
    return [rows[answer] for answer in by_hash]


def split() -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows)."""
    rows = all_rows()
    held_rows = rows[: min(HELDOUT_ROWS, len(rows) // 10)]
    held_out = HeldOut(held_rows)
    return [row for row in rows[len(held_rows) :] if not held_out.is_revealed_by(row.answer)], held_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "heldout"), split(), strict=True):
        path = out / f"{name}.jsonl"
        path.write_text("".join(f"{row.as_json()}\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
