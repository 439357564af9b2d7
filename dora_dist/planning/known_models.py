"""The shapes of well-known models, for planning where the hub cannot be reached or does not let one in.

known_models.json holds those figures of each one's config.json that its shape follows from.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_dist.errors import UserError, nearest
from dora_dist.models.huggingface import resolve_model

_FILE = Path(__file__).with_suffix(".json")


def known_models() -> dict[str, dict]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


@contextmanager
def directory_to_plan(path: str) -> Iterator[tuple[Path, bool]]:
    """A directory with the config.json of `model.path`, and whether it had to be a built-in one.

    Raises:
        UserError: it is neither a directory, nor fetched, nor known.
    """
    try:
        directory = resolve_model(path, config_only=True)
    except UserError as error:
        known = known_models()
        if path not in known:
            hint = "" if path.startswith((".", "/", "~")) else f"; known without the hub: {nearest(path, known)}"
            raise UserError(f"{error}{hint}") from None
        with tempfile.TemporaryDirectory() as made:
            (Path(made) / "config.json").write_text(json.dumps(known[path]), encoding="utf-8")
            yield Path(made), True
        return
    yield directory, False
