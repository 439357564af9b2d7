"""Directories that are whole or not there: killed at every file-system operation, and damaged in every file."""

import os
import random
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from dora_dist.io import durable
from dora_dist.io.durable import Damaged, NewDirectory, replaced, sweep, verify, write_tensors

FILES = {"one.safetensors", "two.safetensors"}
OPERATIONS = [(durable.NewFile, "write"), (os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace")]


def write_state(parent, step, seed=0):
    """A directory of two files of tensors."""
    torch.manual_seed(seed)
    a, none, n = torch.randn(3, 5), torch.zeros(0, 4), torch.ones(())
    # As gathered: one element is contiguous whatever its strides.
    one, row = torch.randn(9).as_strided((1,), (5,), 2), torch.randn(9).as_strided((1, 1), (7, 3))
    tensors = {"a": a, "none": none, "n": n, "one": one, "row": row, "column": torch.randn(3, 2)[:, 1]}
    tensors |= {"b": torch.randn(3).bfloat16(), "c": torch.randn(9).bfloat16().as_strided((1, 1), (3, 2), 1)}
    heads = [(name, t.dtype, t.shape) for name, t in tensors.items()]
    with NewDirectory(parent / f"step-{step}") as new:
        for name in ("one.safetensors", "two.safetensors"):
            with new.file(name) as file:
                write_tensors(file, heads, tensors.values(), {"note": "x"})
        new.commit({"step": step})
    return tensors


def write_file(path, data):
    with replaced(path) as file:
        file.write(data)


def in_child(work, kill_before: int | None = None) -> int:
    """Run `work` in a forked process that is killed before its n-th file-system operation. Returns the number of
    its operations where it ended by itself, -1 where it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        done = 0

        def counted(original):
            def operation(*args, **options):
                nonlocal done
                if done == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return original(*args, **options)

            return operation

        for owner, name in OPERATIONS:
            setattr(owner, name, counted(getattr(owner, name)))
        work()
        os.write(write, str(done).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return int(text) if os.WIFEXITED(status) else -1


def test_what_was_written_is_read_by_safetensors(tmp_path):
    tensors = write_state(tmp_path, 1)
    assert verify(tmp_path / "step-1", FILES)["step"] == 1
    read = load_file(tmp_path / "step-1" / "one.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("again", [False, True], ids=["new", "in place of one"])
def test_killed_before_any_operation_it_is_whole_or_not_there(tmp_path, again):
    def work():
        write_state(place, 2, seed=2)

    place = tmp_path / "count"
    if again:
        write_state(place, 2, seed=1)
    count = in_child(work)
    assert count > 10
    for n in range(count):
        place = tmp_path / str(n)
        write_state(place, 1)
        if again:
            write_state(place, 2, seed=1)
        assert in_child(work, kill_before=n) == -1
        sweep(place)
        left = sorted(path.name for path in place.iterdir())
        assert left in (["step-1"], ["step-1", "step-2"])
        for path in place.iterdir():
            verify(path, FILES)
    place = tmp_path / "count"
    assert verify(place / "step-2", FILES)["step"] == 2


def test_new_names_are_flushed_last(tmp_path, monkeypatch):
    done = []
    for name in ("rename", "replace"):
        take = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *paths, name=name, take=take: done.append(name) or take(*paths))
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_state(tmp_path, 1)
    assert done[-2:] == ["rename", str(tmp_path)]
    write_file(tmp_path / "metrics", b"new")
    assert done[-2:] == ["replace", str(tmp_path)]


def test_every_file_missing_truncated_or_flipped_is_named(tmp_path):
    write_state(tmp_path, 1)
    directory = tmp_path / "step-1"
    chance = random.Random(0)
    for path in sorted(directory.iterdir()):
        whole = path.read_bytes()
        damages = [None, whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"]
        for _ in range(100):
            flipped = bytearray(whole)
            flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(Damaged, match=path.name):
                verify(directory, FILES)
            path.write_bytes(whole)
    verify(directory, FILES)


def test_links_and_files_that_do_not_belong_there_are_refused(tmp_path):
    write_state(tmp_path, 1)
    directory = tmp_path / "step-1"
    with pytest.raises(Damaged, match=r"does not name the files one.safetensors"):
        verify(directory, {"one.safetensors"})
    (directory / "two.safetensors").rename(tmp_path / "elsewhere")
    (directory / "two.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match=r"two.safetensors is a link"):
        verify(directory, FILES)


def test_an_error_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_state(tmp_path, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_state(tmp_path, 2)
        with pytest.raises(OSError, match="File too large"):
            write_file(tmp_path / "metrics", b"x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "metrics"
    path.write_bytes(b"old")
    count = in_child(lambda: write_file(path, b"new"))
    for n in range(count):
        path.write_bytes(b"old")
        assert in_child(lambda: write_file(path, b"new"), kill_before=n) == -1
        assert path.read_bytes() in (b"old", b"new")
        sweep(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["metrics"]
