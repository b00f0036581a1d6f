"""Processes of a training run: a failure of one ends all, with its message, while nobody leaves and nobody waits."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")

from based.torch.train.world import World

SECONDS = 300  # to start two Pythons with torch on a busy machine; what waits does so for days

PROGRAM = """
import contextlib, errno, os
from pathlib import Path
import based
from based.torch._running import only_process
from based.torch.train.world import World

class Unportable(Exception):  # pickle would make it again of one argument, the message
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def fail(error):
    raise error

def in_process_1(error):
    if world.rank == 1:
        raise error
    return world.rank

held = contextlib.ExitStack()
with World(["cpu", DEVICE][int(os.environ["RANK"])]) as world, held:
    for call in (
        lambda: world.from_first(lambda: os.environ["RANK"]),
        lambda: world.from_first(lambda: fail(OSError(errno.ENOSPC, "full", "x"))),
        lambda: world.from_first(lambda: fail(based.FormatError("damaged"))),
        lambda: world.from_first(lambda: fail(KeyboardInterrupt())),
        lambda: world.from_first(lambda: fail(Unportable(1, 2))),
        lambda: world.from_first(lambda: held.enter_context(only_process(Path(FOLDER)))),
        lambda: world.in_each(lambda: world.rank),
        lambda: world.in_each(lambda: in_process_1(MemoryError("of process 1"))),
    ):
        try:
            print(call())
        except BaseException as error:
            print(type(error).__name__, error)
        # Only processes at the same place get past this: nobody has left, whose connections would be closed.
        assert world.largest(world.rank + 5) == 6
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in bound]


def two_processes(program: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs it in two processes of one group. Fails when one has not ended after SECONDS."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        done = []
        for process in processes:
            out, errors = process.communicate(timeout=SECONDS)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
        return done
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_failure_of_one_process_is_that_of_all(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = two_processes(f"DEVICE, FOLDER = 'cpu', {str(tmp_path)!r}\n{PROGRAM}")
    for rank, process in enumerate(done):
        assert process.returncode == 0, process.stderr
        assert process.stdout.splitlines() == [
            "0",
            "OSError [Errno 28] full: 'x'",
            "FormatError damaged",
            "KeyboardInterrupt ",
            "Unportable 1 and 2" if rank == 0 else "RuntimeError Unportable: 1 and 2",
            f"FormatError {tmp_path}: another process is training there",
            str(rank),
            "MemoryError of process 1",
        ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_one_process_lacks_ends_all() -> None:
    for process in two_processes(f"DEVICE, FOLDER = 'cuda', ''\n{PROGRAM}"):
        assert process.returncode == 1
        assert "UnsupportedError: training.device is cuda: PyTorch" in process.stderr.splitlines()[-1]


# Where a run may fail in one process only, in which one; each run has a port.
RUNS = """
import errno, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from based.torch.train import data, log, read_config, train, training_checkpoint

def fail(*_, **__):
    raise OSError(errno.ENOSPC, "full")

places = (
    (log.Table, "add", 0),
    (training_checkpoint, "save", 0),
    (data.Dataset, "open", 1),
    (torch.optim.AdamW, "step", 1),
)
for (owner, name, failing), port in zip(places, PORTS, strict=True):
    os.environ["MASTER_PORT"] = str(port)
    before = getattr(owner, name)
    if int(os.environ["RANK"]) == failing:
        setattr(owner, name, fail)
    try:
        train(read_config(Path(CONFIG)), restart=True)
    except Exception as error:
        print(name, type(error).__name__, error)
    setattr(owner, name, before)
"""


def test_a_run_fails_in_all_processes(tmp_path: Path) -> None:
    """In the one that fails and in the other, by whichever of the files that only one of them writes or reads."""
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    config = {
        "output": "run",
        "model": {"layers": "c", "hidden_size": 8, "num_heads": 1, "inner_size": 8},
        "data": {"tokenizer": "bytes", "sequence_length": 9, "train": [{"text": "a.txt"}]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "batch_size": 2, "precision": "float32", "device": "cpu"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for rank, process in enumerate(two_processes(f"CONFIG, PORTS = {str(path)!r}, {free_ports(4)}\n{RUNS}")):
        assert process.returncode == 0, process.stderr
        *lines, inside = process.stdout.splitlines()
        assert lines == [f"{name} OSError [Errno 28] full" for name in ("add", "save", "open")]
        # Where the processes wait for each other in PyTorch, the other one only sees that this one has left.
        assert inside == "step OSError [Errno 28] full" if rank == 1 else "by peer" in inside, inside


SHARDS = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
import based
from based import sizes
from based.torch import BasedForCausalLM

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = BasedForCausalLM(sizes.named_config("tiny"))
ids = torch.arange(12)[None]
expected = model.hidden(ids).detach()
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
try:
    model.hidden(ids)
except RuntimeError as error:
    print(error)
for method in ("hidden", "logits"):
    register_fsdp_forward_method(model, method)
print(torch.allclose(model.hidden(ids), expected, atol=1e-6), tuple(model.logits(expected).shape))
model(ids, labels=ids).backward()
model.save(FOLDER)
dist.barrier()
print(torch.allclose(BasedForCausalLM.load(FOLDER).hidden(ids), expected, atol=1e-6))
dist.destroy_process_group()
"""


def test_a_model_in_shards_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    for process in two_processes(f"FOLDER = {str(tmp_path / 'model')!r}\n{SHARDS}"):
        assert process.returncode == 0, process.stderr
        refused, whole, saved = process.stdout.splitlines()
        assert "register_fsdp_forward_method(model, 'hidden') is needed" in refused
        assert whole == "True (1, 12, 264)" and saved == "True"


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World("cpu") as world:
        assert world.from_first(lambda: 3) == world.in_each(lambda: 3) == world.largest(3) == 3
        for call in (world.from_first, world.in_each):
            with pytest.raises(ZeroDivisionError):
                call(lambda: 1 // 0)
