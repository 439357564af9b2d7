"""What `data.train` and `data.eval` may name: a file, a directory of files of one kind, or a hub id.

Parquet and the hub go through `datasets`, imported only when they are asked for.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_dist.data.rows import READERS, Row, as_row, one_line
from dora_dist.errors import UserError
from dora_dist.io.fingerprint import ends_digest
from dora_dist.io.headers import check_path

KINDS = {
    ".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet",
    ".txt": "text", ".md": "text", ".py": "text",
}  # fmt: skip
_SUFFIXES = ", ".join(KINDS)
_DECODED = ("Image", "Audio", "Video")  # features of `datasets` whose values are opened as they are read
EVAL_SPLITS = ("validation", "dev", "valid", "test")


@dataclass(frozen=True)
class Source:
    """Where rows come from; iterating reads it from the start, lazily where the kind allows it."""

    key: str  # the setting that named it, for errors: data.train or data.eval
    path: str
    kind: str  # one of KINDS' values, or "hub"
    names: tuple[str, ...]  # files in order, or the one hub id
    streaming: bool = False

    def __iter__(self) -> Iterator[Row]:
        if self.kind == "hub":
            yield from _hub_rows(self.names[0], self.key, self.streaming)
            return
        for name in self.names:
            try:
                yield from READERS[self.kind](name) if self.kind != "parquet" else _parquet_rows(name, self.key)
            except OSError as error:
                raise UserError(f"{self.key}: {name!r} cannot be read: {error.strerror}") from None

    @property
    def fingerprint(self) -> str:
        """Identifies what is named, without reading it all: of each file its place in the source, its size, its
        first and last MiB; of a hub dataset its id alone."""
        digest = hashlib.sha256(self.kind.encode())
        for name in self.names:
            told = name
            if self.kind != "hub":
                told = f"{Path(name).relative_to(self.path)}\n{ends_digest(Path(name))}"
            digest.update(f"{told}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def find_source(path: str, key: str = "data.train", streaming: bool = False) -> Source:
    """Tell what `path` is: a file, a directory of files of one kind, or a hub id.

    Raises:
        UserError: nothing is there, or the files are of no kind, or not of one kind.
    """
    local = Path(path)
    check_path(path, key)
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if not file.is_dir() and not _hidden(file, local))
        odd = next((file for file in files if not file.is_file()), None)
        if odd is not None:
            raise UserError(f"{key}: {str(odd)!r} is no readable file (a link to nothing, or a device)")
        if not files:
            raise UserError(f"{key}: the directory {path!r} holds no files; valid would be {_SUFFIXES} files")
        kinds = {_kind_of(file, key): file for file in reversed(files)}
        if len(kinds) > 1:
            examples = ", ".join(sorted(str(file) for file in kinds.values()))
            raise UserError(f"{key}: the files in {path!r} are not all of one kind: {examples}")
        return Source(key, path, next(iter(kinds)), tuple(map(str, files)), streaming)
    if local.exists() and not local.is_file():
        raise UserError(f"{key}: {path!r} is neither a file nor a directory")
    if local.exists():
        return Source(key, path, _kind_of(local, key), (path,), streaming)
    if is_hub_id(path):
        return Source(key, path, "hub", (path,), streaming)
    raise UserError(
        f"{key}: there is no file or directory {path!r}, and it is not a hub id either; "
        f"valid would be a {_SUFFIXES} file, a directory of them, or a hub id such as org/name"
    )


def is_hub_id(path: str) -> bool:
    """Whether `path` looks like `org/name`: no file suffix, not absolute, not starting with a dot."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return False
    return not re.search(r"\.[A-Za-z]\w*$", path)  # a version such as org/data-1.5 is no suffix


def _hidden(file: Path, directory: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in file.relative_to(directory).parts)


def _kind_of(file: Path, key: str) -> str:
    kind = KINDS.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{key}: {str(file)!r} is of no known kind; valid would be {_SUFFIXES}")
    return kind


def _parquet_rows(name: str, key: str) -> Iterator[Row]:
    datasets = _import_datasets(key)
    try:  # streaming reads the file in place; without it `datasets` copies everything into its cache
        rows = datasets.load_dataset("parquet", data_files=[name], split="train", streaming=True)
        yield from _table_rows(name, rows)
    except Exception as error:  # pyarrow's errors share no useful base
        raise UserError(f"{name}: not readable as parquet: {one_line(error)}") from None


def _hub_rows(name: str, key: str, streaming: bool) -> Iterator[Row]:
    datasets = _import_datasets(key)
    try:
        split = "train" if key == "data.train" else _eval_split(datasets, name)
        rows = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # network, permission and format errors share no base
        raise UserError(
            f"{key}: there is no local file {name!r}, and the hub's dataset of that name cannot be loaded: "
            f"{one_line(error)}"
        ) from None
    yield from _table_rows(name, rows)


def _table_rows(name: str, rows: Any) -> Iterator[Row]:
    features: Any = getattr(rows, "features", None) or {}
    for column, feature in features.items():
        kind = getattr(feature, "feature", feature)
        if type(kind).__name__ in _DECODED:  # refused by name later, without the packages that open them
            closed = type(kind)(decode=False)
            rows = rows.cast_column(column, closed if kind is feature else type(feature)(closed))
    for number, fields in enumerate(rows, start=1):
        made = {key: without_padding(value, features.get(key)) for key, value in fields.items()}
        yield as_row(f"{name}:{number}", made)


def without_padding(value: Any, feature: Any) -> Any:
    """A value of a table without the nulls that stand for keys which its objects do not have.

    In a table all objects of a column have the keys of each, so a null in one cannot be told from a missing key,
    and is taken for one. Nulls in lists are no padding, nor are those in JSON, which keeps objects as they were.

    Args:
        feature: the value's type as `datasets` names it; None: unknown.
    """
    if isinstance(value, Mapping) and (feature is None or isinstance(feature, Mapping)):
        known = feature or {}
        return {key: without_padding(item, known.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list) and (feature is None or isinstance(feature, list) or hasattr(feature, "feature")):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_padding(item, inner) for item in value]
    return value


def _eval_split(datasets: Any, name: str) -> str:
    splits = datasets.get_dataset_split_names(name)
    for split in EVAL_SPLITS:
        if split in splits:
            return split
    raise ValueError(f"its splits are {', '.join(splits)}; one of {', '.join(EVAL_SPLITS)} is needed")


def _import_datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}: parquet files and hub datasets need `pip install datasets`") from None
    return datasets
