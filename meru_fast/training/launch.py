"""The command line of the trainer, and the start of its processes."""

import argparse
import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from omegaconf import DictConfig

DESCRIPTION = """\
Train MERU or CLIP. One command, any number of processes:

  meru-fast train --config train_meru_vit_l --output-dir runs/l                         one process, on a GPU if any
  meru-fast train --config train_meru_vit_l --output-dir runs/l --num-gpus 8            eight, on one machine
  deepspeed --hostfile hosts scripts/train.py --config ... --deepspeed_config ds.json   DeepSpeed's own launcher
  torchrun --nproc_per_node 8 scripts/train.py --config ...    or    srun meru-fast train --config ...

Without a GPU, --num-gpus N starts N CPU processes. Everything in the config can be changed by key=value:

  ... dataset.shards='data/*.tar' train.total_batch_size=1024 train.accumulation_steps=4 model.embed_dim=256

The same command with --resume auto goes on after any crash. SIGTERM saves and stops, SIGUSR1 saves and goes on.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meru-fast train", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a .py or .yaml config, or the name of a packaged one")
    add("--output-dir", default="./output", metavar="DIR", help="run folder: config, logs, metrics, checkpoints")
    add(
        "--resume",
        nargs="?",
        const="latest",
        metavar="auto|PATH",
        help="go on from the newest good checkpoint of the run folder (error if none), from PATH, or with 'auto' from "
        "the newest if there is one and else from the start",
    )
    add("--dry-run", action="store_true", help="print config, parameter counts, memory per ZeRO stage; build no engine")
    add(
        "--deepspeed_config", metavar="JSON", help="DeepSpeed config, passed through whole; 'auto' values are filled in"
    )
    add("--deepspeed", action="store_true", help="accepted for habit: the engine always is DeepSpeed")
    add("--num-gpus", type=int, metavar="N", help="processes on this machine (published name; on a CPU: N processes)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines, each running this command")
    add("--machine-rank", type=int, default=0, metavar="R", help="which of them this is")
    add("--dist-url", metavar="tcp://HOST:PORT", help="where machine 0 listens (needed with several machines)")
    add("--checkpoint-period", type=int, metavar="N", help="same as train.checkpoint_period=N")
    add("--log-period", type=int, metavar="N", help="same as train.log_period=N")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="key=value", help="changes to the config")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_intermixed_args(argv)
    if args.resume and "=" in args.resume and not os.path.exists(args.resume):  # --resume key=value
        args.overrides.insert(0, args.resume)
        args.resume = "latest"
    for flag in ("checkpoint_period", "log_period"):
        if getattr(args, flag) is not None:
            args.overrides.append(f"train.{flag}={getattr(args, flag)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the trainer, or start the processes that do. Returns the exit status.

    Raises:
        SystemExit: after one line about a fault of the user's files (status 2) or of the numbers (3). Its context is
            the fault itself, for `meru-fast --debug`; of a run that had started, the traceback is in logs/rank*.log.
    """
    from meru_fast.config import ConfigError
    from meru_fast.data.errors import DataError

    args = parse(argv)
    place = Place.from_environment(os.environ, srun=args.num_gpus is None)
    try:
        if place is None and not args.dry_run and max(args.num_gpus or 1, args.num_machines) > 1:
            _read_configs(args)  # a mistake in them is told once, before anything starts
            return start_processes(args, sys.argv[1:] if argv is None else list(argv))
        return run(args, place or Place.alone())
    except ConfigError as error:
        _exit(str(error), tells=place is None or place.rank == 0)  # all ranks found the same
    except DataError as error:
        _exit(f"rank {place.rank}: {error}" if place else str(error))


def _exit(fault: str, status: int = 2, tells: bool = True) -> NoReturn:
    if tells:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(status)


def run(args: argparse.Namespace, place: "Place") -> int:
    """Train, or tell what training would do, in this process."""
    from meru_fast.checkpoint import CheckpointError
    from meru_fast.training import report
    from meru_fast.training.guards import EXIT_NONFINITE, NonFiniteError
    from meru_fast.training.loop import train

    cfg, ds_config = _read_configs(args)
    if args.dry_run:
        if place.rank == 0:
            report.dry_run(cfg, ds_config, max(place.world_size, (args.num_gpus or 1) * args.num_machines))
        return 0
    try:
        with process_environment(place):
            return train(cfg, args.output_dir, ds_config=ds_config, resume=args.resume)
    except NonFiniteError as error:
        _exit(str(error), EXIT_NONFINITE)
    except CheckpointError as error:
        _exit(str(error), tells=place.rank == 0)


def _read_configs(args: argparse.Namespace) -> tuple[DictConfig, dict[str, Any]]:
    from meru_fast import config
    from meru_fast.training import deepspeed_config

    return config.load(args.config, args.overrides), deepspeed_config.read(args.deepspeed_config)


@dataclass(frozen=True)
class Place:
    """Where in the run this process is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def alone(cls) -> "Place":
        return cls(0, 1, 0, 1, "127.0.0.1", free_port())

    @classmethod
    def from_environment(cls, env: Mapping[str, str], srun: bool = True) -> "Place | None":
        """From what deepspeed, torchrun or srun set; None where no launcher did.

        Without `srun` SLURM's variables do not count: a batch script has them too, and may start processes itself.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            local = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
            return cls(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", "0")),
                int(local),
                env.get("MASTER_ADDR", "127.0.0.1"),
                int(env.get("MASTER_PORT", "29500")),
            )
        if srun and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
            # Ports of one job's steps must agree and of different jobs differ: derive it from the job.
            job = int(env.get("SLURM_JOB_ID", "0"))
            # With --gpus-per-task every task sees its own GPUs only, and counts them from 0.
            visible = len([name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name])
            local_rank = int(env.get("SLURM_LOCALID", "0"))
            return cls(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_NTASKS"]),
                local_rank % visible if visible else local_rank,
                int(re.split(r"\D", env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")))[0]),
                env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))),
                int(env.get("MASTER_PORT", 10_000 + job % 50_000)),
            )
        return None

    def variables(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def first_host(nodes: str) -> str:
    """First host of a SLURM list: "gpu[07-09,12],cpu1" is "gpu07"."""
    head = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return (head.group(1) + (head.group(2) or "")) if head else "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process_environment(place: Place) -> Iterator[None]:
    """The variables torch.distributed reads, set for the run and put back after it."""
    before = {name: os.environ.get(name) for name in place.variables()}
    os.environ.update(place.variables())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start_processes(args: argparse.Namespace, argv: list[str]) -> int:
    """Start this machine's processes through DeepSpeed's per-machine launcher, and wait for them.

    The launcher stops all processes when one of them fails, and hands SIGTERM on to them.

    Raises:
        ConfigError: several machines without a usable ``--dist-url``, or more processes than GPUs.
    """
    import torch

    per_machine = args.num_gpus or 1
    if args.num_machines > 1:
        address = re.fullmatch(r"tcp://([^:]+):(\d+)", args.dist_url or "")
        if not address:
            from meru_fast.config import ConfigError

            raise ConfigError(f"--dist-url {args.dist_url}: several machines need tcp://HOST:PORT of machine 0")
        host, port = address.group(1), int(address.group(2))
    else:
        host, port = "127.0.0.1", free_port()
    gpus = device_ids(per_machine, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    machines = {f"machine{index}": gpus for index in range(args.num_machines)}
    world_info = base64.urlsafe_b64encode(json.dumps(machines).encode()).decode()
    command = [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level=warning"),
        *(f"--world_info={world_info}", f"--node_rank={args.machine_rank}"),
        *(f"--master_addr={host}", f"--master_port={port}", "--no_local_rank"),
        *("--module", "meru_fast.training", *argv),
    ]
    logging.getLogger(__name__).debug("starting %s", command)
    with started(command) as launcher:
        while True:
            try:
                return launcher.wait()
            except KeyboardInterrupt:  # the terminal interrupted the launcher as well; it is stopping
                continue


def device_ids(processes: int, gpus: int, visible: str | None) -> list[int | str]:
    """What each process gets as its CUDA_VISIBLE_DEVICES.

    Args:
        processes: on this machine.
        gpus: that torch sees here; 0 means a run on the CPU.
        visible: CUDA_VISIBLE_DEVICES of this process.

    Raises:
        ConfigError: more processes than GPUs.
    """
    if gpus == 0:
        return [-1] * processes  # CUDA's word for none: what is hidden stays hidden
    if processes > gpus:
        from meru_fast.config import ConfigError

        allowed = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        raise ConfigError(f"--num-gpus {processes}: there are {gpus} here{allowed}")
    names: list[int | str] = [name.strip() for name in visible.split(",")] if visible else list(range(gpus))
    return names[:processes]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """`command` as a child. SIGTERM to this process reaches it, SIGUSR1 the ranks that it starts.

    DeepSpeed's launcher would die of SIGUSR1, and so would ranks that are not listening yet: they inherit ignoring it.
    """
    import psutil

    if threading.current_thread() is not threading.main_thread():  # signals only reach that one
        yield subprocess.Popen(command)
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    child = subprocess.Popen(command)

    def to_ranks(number: int, frame: Any) -> None:
        with suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(child.pid).children():
                rank.send_signal(number)

    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    signal.signal(signal.SIGUSR1, to_ranks)
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
