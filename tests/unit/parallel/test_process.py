"""One process among its peers: which device it has, and how ranks wait for each other in the run's store.

The ranks are threads, each with a connection of its own to one store; GPUs are stand-ins."""

import datetime
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dora_dist.errors import UserError
from dora_dist.models.weights import load_whole
from dora_dist.parallel import process, zero
from dora_dist.parallel.process import Processes
from dora_dist.parallel.shards import Whole

RANKS = 3


class Counted:
    """A store that notes what it is asked."""

    def __init__(self, store):
        self.store, self.asked = store, []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.store, name)


@pytest.fixture
def ranks(monkeypatch):
    """Processes of a run, of which this is no process."""
    monkeypatch.setattr(process, "_ANY_TIME", datetime.timedelta(seconds=60))
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    made = []
    for rank in range(RANKS):
        made.append(Processes())
        made[-1].rank, made[-1].world_size = rank, RANKS
        made[-1].store = Counted(dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False))
    yield made
    assert server.num_keys() <= 1  # torch's own


def on_all(ranks, call):
    """`call(processes)` on every rank at once, rank 0 last."""
    with ThreadPoolExecutor(RANKS) as pool:
        others = [pool.submit(call, processes) for processes in ranks[1:]]
        first = pool.submit(call, ranks[0])
        return [first.result(60), *(other.result(60) for other in others)]


def test_what_rank_0_tells_is_waited_for_by_one_request_and_then_deleted(ranks):
    for turn in range(3):
        told = on_all(ranks, lambda processes, turn=turn: processes.from_main([processes.rank, turn]))
        assert told == [[0, turn]] * RANKS
    for processes in ranks[1:]:
        assert "check" not in processes.store.asked and processes.store.asked.count("wait") == 3


def test_what_rank_0_alone_finds_out_all_know_and_its_mistakes_too(ranks):
    def refuse():
        raise UserError("output_dir: no room")

    def attempt(processes):
        with pytest.raises(UserError, match="output_dir: no room"):
            processes.on_main(refuse)
        return processes.on_main(lambda: processes.rank)

    assert on_all(ranks, attempt) == [0] * RANKS


def test_nobody_goes_on_before_all_have_come(ranks):
    come = []

    def meet(processes):
        come.append(processes.rank)
        processes.wait_for_all()
        return len(come)

    assert on_all(ranks, meet) == [RANKS] * RANKS
    on_all(ranks, lambda processes: processes.wait_for_all())


def test_the_error_of_the_rank_that_loads_is_every_rank_s(ranks):
    def load():
        raise UserError("model.path: no such tensor")

    def attempt(processes):
        with pytest.raises(UserError, match=r"^model\.path: no such tensor$"):
            load_whole(nn.Linear(1, 1), load, Whole(), processes)

    on_all(ranks, attempt)


@pytest.fixture
def gpus(monkeypatch):
    """Has torch see this many."""

    def seen(count, uuids=("a",)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        properties = iter([SimpleNamespace(uuid=uuid) for uuid in uuids])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: next(properties))

    return seen


def test_a_process_that_sees_one_gpu_takes_it_whatever_its_local_rank(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    gpus(1)
    alone = Processes()
    assert alone.device == torch.device("cuda", 0)
    with zero._numbers_its_gpu(alone):
        assert zero.os.environ["LOCAL_RANK"] == "0"
    assert zero.os.environ["LOCAL_RANK"] == "2"
    gpus(4)
    assert Processes().device == torch.device("cuda", 2)
    gpus(2)
    with pytest.raises(UserError, match="local rank 2 has no GPU: this machine has 2"):
        Processes()


@pytest.mark.parametrize(("uuids", "shared"), [("abc", False), ("aba", True)])
def test_processes_of_a_machine_that_see_the_same_gpu_are_refused(ranks, gpus, uuids, shared):
    gpus(1, uuids)
    refused = []

    def start(processes):
        processes.local_rank, processes.local_world_size = processes.rank, RANKS
        try:
            processes._refuse_shared_gpu(60)
        except UserError as error:
            refused.append(str(error))

    on_all(ranks, start)
    assert refused == ["this machine has one GPU for 3 processes; launch no more processes than GPUs"] * 3 * shared
    for rank in range(RANKS):
        ranks[0].store.delete_key(f"gpu/{rank}")


@pytest.mark.parametrize(("device", "limit"), [("cuda", 40), ("cpu", 15)])
def test_nccl_has_more_time_than_the_watchdog_for_it_counts_what_is_ahead_of_it(device, limit, monkeypatch):
    """A stand-in: what the group is told of a GPU's run. gloo's limit is that of a CPU's under both."""
    given, default = {}, dist.distributed_c10d
    gloo = SimpleNamespace(_set_default_timeout=lambda timeout: given.update(gloo=timeout))
    monkeypatch.setattr(dist, "init_process_group", lambda **options: given.update(options))
    monkeypatch.setattr(default, "_get_default_group", lambda: SimpleNamespace(_get_backend=lambda device: gloo))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(default, name, None)
    processes = Processes()
    processes.device = torch.device(device)
    processes.start(10)
    seconds = datetime.timedelta(seconds=limit)
    assert given["timeout"] == default.default_pg_timeout == default.default_pg_nccl_timeout == seconds
    assert given["gloo"] == datetime.timedelta(seconds=15)


def test_zero_takes_deepspeed_s_device(monkeypatch):
    """Also on a machine with a GPU that is not used."""
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", CPU_Accelerator())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, lambda group=None: 0)
    assert zero.ZeroShards(SimpleNamespace(ds_process_group=None)).device == torch.device("cpu")
