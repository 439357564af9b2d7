"""Headers of safetensors files: what cannot be opened is told with its reason. Damaged ones: tests/refusals."""

import errno
import os

import pytest

from dora_dist.errors import UserError
from dora_dist.io.headers import read_header


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_opened_is_not_called_missing(number, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")

    def refuse(self, *_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError, match=os.strerror(number)):
        read_header(path)
