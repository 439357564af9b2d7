"""Two hundred mistakes in data: what can be wrong with each field of each format, in each kind of file."""

import gzip
import json
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from dora_dist.data.formats import Labels
from tests.support.data import load, make_tokenizer
from tests.support.refusals import Case

ROWS: dict[str, dict[str, Any]] = {  # a good row of each format
    "prompt_completion": {"prompt": "the fox:", "completion": " jumps"},
    "alpaca": {"instruction": "say", "input": "dog", "output": "the dog"},
    "text": {"text": "the quick brown fox"},
    "labels": {"text": "the fox", "text_pair": "the dog", "label": 1},
    "chat": {"messages": [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "fox?"}, {"from": "gpt", "value": "dog"}]},
    "preference": {"prompt": "the fox:", "chosen": " jumps", "rejected": " sleeps"},
    "unpaired_preference": {"prompt": "the fox:", "completion": " jumps", "label": True},
}
PREFERENCES = ("preference", "unpaired_preference")
UNSUPPORTED = {  # a field with a meaning that no format here has: format, field, value
    "pictures": ("chat", "images", ["a.png"]),
    "pictures of a text": ("text", "image", "a.png"),
    "sound of pairs": ("prompt_completion", "audio", {"path": "a.wav"}),
    "a worse answer": ("prompt_completion", "rejected", "no"),
    "a better answer": ("alpaca", "chosen", "yes"),
    "whether it is liked": ("prompt_completion", "label", True),
    "tools of plain text": ("prompt_completion", "tools", [{"name": "find"}]),
    "tools of an instruction": ("alpaca", "tools", '[{"name": "find"}]'),
    "a system text of plain text": ("prompt_completion", "system", "speak"),
    "history as text": ("alpaca", "history", "before"),
    "pictures of a pair": ("preference", "images", ["a.png"]),
    "tools of a pair of texts": ("preference", "tools", [{"name": "find"}]),
    "nothing chosen": ("preference", "chosen", ""),
    "nothing rejected": ("preference", "rejected", ""),
    "nothing completed": ("unpaired_preference", "completion", ""),
    "a worse answer beside a label": ("unpaired_preference", "rejected", "no"),
    "tools that the template cannot show": ("chat", "tools", [{"name": "find"}]),
    "tools as broken JSON": ("chat", "tools", "[{"),
    "tools that are names": ("chat", "tools", ["find"]),
    "options that are a list": ("chat", "chat_template_kwargs", [1]),
    "options of transformers": ("chat", "chat_template_kwargs", {"tokenize": True}),
    "a system text that is a number": ("sharegpt", "system", 3),
}
OPTIONAL = {("alpaca", "input"), ("labels", "text_pair"), ("preference", "prompt")}
VALUES: dict[str, Any] = {  # no strings that could be tokenized
    "missing": ..., "null": None, "a number": 3, "a boolean": True, "a list": ["a"], "an object": {"a": "b"},
    "half a character": "\ud800",
}  # fmt: skip
LABELS: dict[str, Any] = {
    "missing": ..., "null": None, "too large": 3, "negative": -1, "a fraction": 1.5, "a boolean": True,
    "a list": [1], "an unknown name": "fine", "a name in other letters": "GOOD", "empty": "", "out of range": "3",
}  # fmt: skip
LINES = {  # one line in place of a row, and what the message must hold
    "a list": ("[1]", "the row is a list"),
    "a number": ("7", "the row is the number 7"),
    "a string": ('"fox"', "the row is a string"),
    "null": ("null", "the row is null"),
    "NaN": ('{"prompt": "a", "completion": "b", "x": NaN}', "NaN is not JSON"),
    "Infinity": ('{"prompt": "a", "completion": "b", "x": [-Infinity]}', "-Infinity is not JSON"),
    "too large": ('{"prompt": "a", "completion": "b", "x": 1e999}', "the number 1e999 is too large"),
    "too many digits": (f'{{"prompt": "a", "completion": "b", "x": 1{"0" * 5000}}}', "broken JSON"),
    "a key twice": ('{"prompt": "a", "prompt": "c", "completion": "b"}', "the key 'prompt' stands twice"),
    "a key twice, inside": ('{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 2}}', "'y' stands twice"),
    "cut off": ('{"prompt": "a", "completion":', "broken JSON"),
    "single quotes": ("{'prompt': 'a', 'completion': 'b'}", "broken JSON"),
    "a comma too many": ('{"prompt": "a", "completion": "b",}', "broken JSON"),
    "a comment": ('{"prompt": "a", "completion": "b"} // x', "broken JSON"),
    "too deep": ("[" * 100_000, "broken JSON"),
    "a tab in a string": ('{"prompt": "a\tb", "completion": "b"}', "broken JSON"),
    "a mark of order in the middle": ('\ufeff{"prompt": "a", "completion": "b"}', "broken JSON"),
    "Python's None": ('{"prompt": None, "completion": "b"}', "broken JSON"),
}


@cache
def _tokenizer(template: bool = True):
    tokenizer = make_tokenizer(end=True)
    if not template:
        tokenizer.chat_template = None
    return tokenizer


def read(path: Path, form: str = "auto", **settings) -> object:
    labels = Labels(3, {"bad": 0, "good": 2}) if form == "labels" else None
    form = "chat" if form == "sharegpt" else form
    settings |= {"needed": form} if form in PREFERENCES else {}
    return load(str(path), settings.pop("tokenizer", None) or _tokenizer(), labels, format=form, **settings)


def write(path: Path, lines: list[str]) -> Path:
    """Rows as text, one a line, in a list where the file is .json."""
    text = "[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def _damaged_row(kind: str, form: str, row: dict, directory: Path) -> object:
    lines = [json.dumps(ROWS[form]), json.dumps(row), json.dumps(ROWS[form])]
    return read(write(directory / f"t.{kind}", lines), form)


def _with(row: dict, key: str, value: Any) -> dict:
    return {k: v for k, v in {**row, key: value}.items() if v is not ...}


def _damaged_rows(form: str) -> Iterator[tuple[str, str, dict]]:
    """(the damage, what the message must name, the row)"""
    row = ROWS[form]
    if form in ("chat", "sharegpt"):
        (field,) = row
        for key in row[field][0]:
            for damage, value in VALUES.items():
                turns = [row[field][0], _with(row[field][1], key, value)]
                yield f"{key}: {damage}", f"{key!r}", {field: turns}
        for damage, value in {**VALUES, "empty": [], "text": "hello"}.items():
            named = "messages" if damage == "missing" else field
            yield f"{field}: {damage}", f"{named!r}", _with(row, field, value)
        return
    for key in row:
        for damage, value in (LABELS if key == "label" else VALUES).items():
            if (form, key, damage) == ("unpaired_preference", "label", "a boolean"):
                continue
            if (form, key) not in OPTIONAL or damage not in ("missing", "null"):
                yield f"{key}: {damage}", f"{key!r}", _with(row, key, value)


def _line(kind: str, line: str, directory: Path) -> object:
    good = json.dumps(ROWS["prompt_completion"])
    return read(write(directory / f"t.{kind}", [good, line, good]), "prompt_completion")


def _bytes(name: str, content: bytes, directory: Path, form: str = "auto", **settings) -> object:
    (directory / name).write_bytes(content)
    return read(directory / name, form, **settings)


CSVS = {
    "too few fields": (b"prompt,completion\na,b\nc\n", "t.csv:3: the row has 1 fields"),
    "too many fields": (b"prompt,completion\na,b,c\n", "t.csv:2: the row has 3 fields"),
    "semicolons": (b"prompt;completion\na;b\n", "t.csv:2: the keys found ('prompt;completion')"),
    "no header": (b"hello,there\na,b\n", "t.csv:2: the keys found ('hello', 'there')"),
    "a name twice": (b"prompt,prompt\na,b\n", "t.csv:1: the header's names"),
    "a name without letters": (b"prompt,,completion\na,b,c\n", "t.csv:1: the header's names"),
    "an unclosed quote": (b'prompt,completion\na,"b\n', "t.csv:2: broken CSV"),
    "text behind a quote": (b'prompt,completion\n"a"x,b\n', "t.csv:2: broken CSV"),
    "latin-1": (b"prompt,completion\na,b\nc,\xe9\n", "t.csv:3: not valid UTF-8"),
    "latin-1 in the header": (b"prompt,compl\xe9tion\na,b\n", "t.csv:"),
    "UTF-16": ("prompt,completion\na,b\n".encode("utf-16"), "t.csv:"),
    "nothing": (b"", "holds no rows"),
    "a header alone": (b"prompt,completion\n", "holds no rows"),
}
FILES = {  # name, content, what the message must name
    "gzip": ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n'), "of no known kind"),
    "gzip, cut off": ("t.json.gz", gzip.compress(b"[]")[:9], "of no known kind"),
    "gzip under another name": ("t.jsonl", gzip.compress(b'{"text": "a"}\n'), "t.jsonl:1: not valid UTF-8"),
    "zip": ("t.zip", b"PK\3\4", "of no known kind"),
    "a pickle": ("t.pkl", b"\x80\4.", "of no known kind"),
    "arrow": ("t.arrow", b"ARROW1", "of no known kind"),
    "tab-separated": ("t.tsv", b"text\na\n", "of no known kind"),
    "no suffix": ("train", b"text", "of no known kind"),
    "empty jsonl": ("t.jsonl", b"", "holds no rows"),
    "blank jsonl": ("t.jsonl", b"\n \n\n", "holds no rows"),
    "empty json": ("t.json", b"", "holds no rows"),
    "empty list": ("t.json", b"[]", "holds no rows"),
    "blank text": ("t.txt", b" \n", "holds no rows"),
    "jsonl named json": ("t.json", b'{"text": "a"}\n{"text": "b"}\n', "does not hold a list"),
    "json named jsonl": ("t.jsonl", b'[\n{"text": "a"}\n]\n', "t.jsonl:1: broken JSON"),
    "an object of columns": ("t.json", b'{"text": ["a"]}', "does not hold a list"),
    "no comma between rows": ("t.json", b'[\n{"text": "a"}\n{"text": "b"}]', "t.json:3: broken JSON"),
    "an unclosed list": ("t.json", b'[{"text": "a"}', "t.json:1: broken JSON"),
    "two lists": ("t.json", b'[{"text": "a"}]\n[]', "t.json:2: broken JSON"),
    "latin-1 json": ("t.json", b'[\n{"text": "\xe9"}]', "t.json:2: not valid UTF-8"),
    "latin-1 jsonl": ("t.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "t.jsonl:2: not valid UTF-8"),
    "latin-1 text": ("t.txt", b"a\nb\n\xe9\n", "t.txt:3: not valid UTF-8"),
    "UTF-16 jsonl": ("t.jsonl", '{"text": "a"}\n'.encode("utf-16"), "t.jsonl:1: not valid UTF-8"),
    "UTF-16 json": ("t.json", '[{"text": "a"}]'.encode("utf-16"), "t.json:1: not valid UTF-8"),
    "UTF-32 text": ("t.txt", "é".encode("utf-32"), "t.txt:1: not valid UTF-8"),
    "nonsense for parquet": ("t.parquet", b"nonsense", "t.parquet: not readable as parquet"),
    "empty parquet": ("t.parquet", b"", "t.parquet: not readable as parquet"),
    "parquet's ends alone": ("t.parquet", b"PAR1PAR1", "t.parquet: not readable as parquet"),
    "unknown keys": ("t.jsonl", b'{"question": "a", "answer": "b"}\n', "t.jsonl:1: the keys found ('question'"),
    "no keys": ("t.jsonl", b"{}\n", "t.jsonl:1: the keys found (none)"),
    "keys with blanks": ("t.jsonl", b'{" prompt": "a", "completion ": "b"}\n', "t.jsonl:1: the keys found"),
    "empty document": ("t.jsonl", b'{"text": "a"}\n{"text": ""}\n', "t.jsonl:2: the field 'text' is empty"),
}
SETTINGS: dict[str, tuple[str, str, dict, str]] = {  # format of the row, asked-for format, settings, message
    "alpaca for chat": ("alpaca", "chat", {}, "t.jsonl:1: the field 'messages' is missing"),
    "chat for alpaca": ("chat", "alpaca", {}, "t.jsonl:1: the field 'instruction' is missing"),
    "text for prompts": ("text", "prompt_completion", {}, "t.jsonl:1: the field 'prompt' is missing"),
    "prompts for text": ("prompt_completion", "text", {}, "t.jsonl:1: the field 'text' is missing"),
    "text for labels": ("text", "labels", {}, "t.jsonl:1: the field 'label' is missing"),
    "chat without a template": ("chat", "chat", {"tokenizer": False}, "data.format: chat needs"),
    "a tokenizer too large": ("text", "text", {"vocab_size": 7}, "the model's vocabulary is 7"),
    "no room for the completion": ("prompt_completion", "auto", {"seq_len": 4}, "t.jsonl:1: the prompt's"),
    "all rows bad": ("text", "alpaca", {"on_bad_row": "skip"}, "all 1 rows are bad"),
}


def _setting(form: str, asked: str, settings: dict, directory: Path) -> object:
    if "tokenizer" in settings:
        settings = {**settings, "tokenizer": _tokenizer(template=False)}
    return read(write(directory / "t.jsonl", [json.dumps(ROWS[form])]), asked, **settings)


def _parquet(directory: Path, row: dict, keep: float = 1.0) -> object:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "t.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS["prompt_completion"], row]), path)
    content = path.read_bytes()
    return _bytes("t.parquet", content[: int(len(content) * keep)], directory, "prompt_completion")


def _directory(files: dict[str, bytes], directory: Path) -> object:
    for name, content in files.items():
        (directory / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "d" / name).write_bytes(content)
    (directory / "d").mkdir(exist_ok=True)
    return read(directory / "d")


def _link(target: str, name: str, directory: Path) -> object:
    (directory / "d").mkdir()
    (directory / "d" / "good.jsonl").write_text('{"text": "the fox"}\n')
    (directory / "d" / name).symlink_to(target)
    return read(directory / "d" / name if name == "t.jsonl" else directory / "d")


def _pipe(directory: Path) -> object:
    os.mkfifo(directory / "t.jsonl")
    return read(directory / "t.jsonl")


def _turns(*roles: str) -> Case:
    turns = [{"role": role, "content": "dog"} for role in roles]
    run = partial(_damaged_row, "jsonl", "chat", {"messages": turns})
    return Case(f"turns of {roles}", run, ("t.jsonl:2: there is no assistant turn",))


def cases() -> Iterator[Case]:
    for kind in ("jsonl", "json"):
        for form in ROWS:
            for damage, key, row in _damaged_rows(form):
                run = partial(_damaged_row, kind, form, row)
                yield Case(f"{kind}, {form}, {damage}", run, (f"{{d}}/t.{kind}:2:", key))
        for name, (line, message) in LINES.items():
            if (kind, name) != ("json", "a comment"):
                yield Case(f"{kind}, {name}", partial(_line, kind, line), (f"{{d}}/t.{kind}:2:", message))
    for name, (form, key, value) in UNSUPPORTED.items():
        run = partial(_damaged_row, "jsonl", form, {**ROWS[form], key: value})
        yield Case(name, run, ("t.jsonl:2:", key if key != "chat_template_kwargs" else "template"))
    for role in ("bot", "assistant ", "Human", ""):
        turns = [{"from": "human", "value": "a"}, {"from": role, "value": "b"}]
        run = partial(_damaged_row, "jsonl", "sharegpt", {"conversations": turns})
        yield Case(f"the role {role!r}", run, ("t.jsonl:2: 'from' is", "item 2"))
    yield from (_turns("user"), _turns("system", "user"), _turns("Assistant"), _turns("user", "model"))
    for name, (content, message) in CSVS.items():
        yield Case(f"csv, {name}", partial(_bytes, "t.csv", content), (message,))
    for label in ("3", "-1", "1.0", "fine", "", " good", "²"):
        content = f"text,label\nfox,1\ndog,{label}\n".encode()
        run = partial(_bytes, "t.csv", content, form="labels")
        yield Case(f"csv, label {label!r}", run, ("t.csv:3:", "'label'"))
    for name, (file, content, message) in FILES.items():
        yield Case(name, partial(_bytes, file, content), (message,))
    for name, (form, asked, settings, message) in SETTINGS.items():
        yield Case(name, partial(_setting, form, asked, settings), (message,))
    good = ROWS["prompt_completion"]
    for keep in (0.3, 0.6, 0.95):
        run = partial(_parquet, row=good, keep=keep)
        yield Case(f"parquet cut to {keep}", run, ("{d}/t.parquet: not readable as parquet",))
    for key in good:
        run = partial(_parquet, row={**good, key: None})
        yield Case(f"parquet, {key}: null", run, ("{d}/t.parquet:2:", f"{key!r} is null"))
    yield from _places()


def _places() -> Iterator[Case]:
    row = b'{"text": "the fox"}\n'
    directories = {
        "mixed kinds": ({"a.jsonl": row, "b.txt": b"fox"}, "not all of one kind"),
        "an unknown kind": ({"a.jsonl": row, "b.bin": b""}, "'{d}/d/b.bin' is of no known kind"),
        "no files": ({}, "holds no files"),
        "hidden files alone": ({".a.jsonl": row, ".git/x.txt": b""}, "holds no files"),
        "a bad row in the second file": ({"a.jsonl": row, "b.jsonl": b"{}\n"}, "d/b.jsonl:1: the field"),
        "a bad file below": ({"a.jsonl": row, "b/c.jsonl": b"\xff\n"}, "{d}/d/b/c.jsonl:1: not valid UTF-8"),
    }
    for name, (files, message) in directories.items():
        yield Case(name, partial(_directory, files), (message,))
    for target in ("nothing", "/dev/zero"):
        run = partial(_link, target, "b.jsonl")
        yield Case(f"a link to {target} among others", run, ("{d}/d/b.jsonl' is no readable file",))
    yield Case("a link to nothing", partial(_link, "nothing", "t.jsonl"), ("there is no file or directory",))
    yield Case("a link to itself", partial(_link, "t.jsonl", "t.jsonl"), ("cannot be read",))
    yield Case("a device", partial(_link, "/dev/zero", "t.jsonl"), ("is neither a file nor a directory",))
    yield Case("a file that cannot be read", partial(_link, "/proc/self/mem", "t.jsonl"), ("cannot be read",))
    yield Case("a pipe", _pipe, ("is neither a file nor a directory",))
    for name in ("no.jsonl", "sub/no.jsonl", "no", "../no.jsonl", "a\0b.jsonl", "n" * 300, "n" * 5000):
        yield Case(f"the name {name[:20]!r} of {len(name)}", partial(_named, name), ("data.train: ",))


def _named(name: str, directory: Path) -> object:
    return load(f"{directory}/{name}", _tokenizer())
