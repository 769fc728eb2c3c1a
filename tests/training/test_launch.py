"""The command line, the environments of launchers, and the start of processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training_runs import ROOT, TINY, environment, metrics, run, start, wait_for_step

from meru_fast.config import ConfigError
from meru_fast.training import launch


def test_published_flags_become_overrides():
    args = launch.parse(["--config", "c", "--checkpoint-period", "7", "--log-period", "3", "train.seed=1"])
    assert args.overrides == ["train.seed=1", "train.checkpoint_period=7", "train.log_period=3"]


@pytest.mark.parametrize(
    ("words", "resume", "overrides"),
    [
        ([], None, []),
        (["--resume"], "latest", []),
        (["--resume", "auto", "a=1"], "auto", ["a=1"]),
        (["--resume", "a=1", "b=2"], "latest", ["a=1", "b=2"]),
        (["a=1", "--resume", "runs/x"], "runs/x", ["a=1"]),
    ],
)
def test_resume_with_and_without_a_value(words, resume, overrides):
    args = launch.parse(["--config", "c", *words])
    assert (args.resume, args.overrides) == (resume, overrides)


def test_deepspeeds_own_arguments_are_accepted():
    args = launch.parse(["--local_rank=1", "--deepspeed", "--deepspeed_config", "ds.json", "--config", "c"])
    assert args.deepspeed_config == "ds.json"


def test_place_from_torchrun_and_slurm():
    assert launch.Place.from_environment({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert launch.Place.from_environment(torchrun) == launch.Place(3, 8, 1, 2, "a", 29500)
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
    }
    assert launch.Place.from_environment(slurm) == launch.Place(5, 8, 1, 4, "gpu07", 11_234)
    assert launch.Place.from_environment(slurm, srun=False) is None  # --num-gpus in a batch script
    one_gpu_each = slurm | {"CUDA_VISIBLE_DEVICES": "3"}
    assert launch.Place.from_environment(one_gpu_each) == launch.Place(5, 8, 0, 4, "gpu07", 11_234)
    all_gpus_each = slurm | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert launch.Place.from_environment(all_gpus_each) == launch.Place(5, 8, 1, 4, "gpu07", 11_234)


@pytest.mark.parametrize(
    ("processes", "gpus", "visible", "ids"),
    [
        (2, 4, None, [0, 1]),
        (2, 3, "2, 5,7", ["2", "5"]),
        (1, 1, "GPU-8932f937", ["GPU-8932f937"]),
        (2, 0, None, [-1, -1]),
        (2, 0, "", [-1, -1]),
    ],
)
def test_processes_get_the_gpus_that_are_visible(processes, gpus, visible, ids):
    assert launch.device_ids(processes, gpus, visible) == ids


def test_more_processes_than_gpus_is_an_error():
    with pytest.raises(ConfigError, match=r"--num-gpus 4: there are 2 here \(CUDA_VISIBLE_DEVICES=1,3\)"):
        launch.device_ids(4, 2, "1,3")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12]", "gpu07"), ("n1,n2", "n1"), ("host", "host"), ("a-[3,5]", "a-3"), ("", "127.0.0.1")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    text = capsys.readouterr().out
    for word in ("--resume", "--num-gpus", "torchrun", "srun", "deepspeed --hostfile", "key=value", "SIGTERM"):
        assert word in text


@pytest.mark.parametrize("by", ["command", "pid"])
def test_sigusr1_saves_and_sigterm_saves_and_stops(tmp_path, by):
    """To the command or to rank 0: through our own start of the processes and DeepSpeed's launcher, down to two ranks
    that agree on the step."""
    running = start(tmp_path, "train.num_iterations=100000", "train.checkpoint_period=100000", processes=2)
    wait_for_step(running, tmp_path, 2)
    os.kill(running.pid if by == "command" else int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline, "SIGUSR1 saved nothing"
        time.sleep(0.05)
    saved_on_request = next((tmp_path / "checkpoints").glob("step_*"))
    assert running.poll() is None, "SIGUSR1 ended the run"
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=240)[0]
    assert running.returncode != 0
    assert "asked to stop" in output
    latest = (tmp_path / "checkpoints" / "latest").read_text()
    assert latest > saved_on_request.name
    assert int(latest[5:]) == int(metrics(tmp_path)[-1]["step"])
    assert (tmp_path / "checkpoints" / latest / "rank_00001.pt").is_file()


def test_ctrl_c_saves_and_stops(tmp_path):
    """A terminal sends SIGINT to the command, the launcher and all ranks at once."""
    running = start(tmp_path, "train.num_iterations=100000", "train.checkpoint_period=100000", processes=2)
    wait_for_step(running, tmp_path, 2)
    os.killpg(running.pid, signal.SIGINT)
    output = running.communicate(timeout=240)[0]
    assert running.returncode != 0
    assert "asked to stop" in output
    latest = (tmp_path / "checkpoints" / "latest").read_text()
    assert int(latest[5:]) == int(metrics(tmp_path)[-1]["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(launch.free_port())],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_other_launchers(tmp_path, launcher):
    script = str(ROOT / "scripts" / "train.py")
    command = [sys.executable, *launcher, script, "--config", str(TINY), "--output-dir", str(tmp_path / "other")]
    subprocess.run([*command, "--deepspeed_config", "multi_node.json"], env=environment(), check=True, timeout=240)
    run(tmp_path / "own", "--deepspeed_config", "multi_node.json", processes=2)
    assert [row["loss"] for row in metrics(tmp_path / "other")] == [row["loss"] for row in metrics(tmp_path / "own")]


@pytest.mark.slow
def test_srun_environment(tmp_path):
    """Two processes with what srun sets and nothing else."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "localhost"}
    command = [sys.executable, "-m", "meru_fast.training", "--config", str(TINY), "--output-dir", str(tmp_path)]
    port = {"MASTER_PORT": str(launch.free_port())}
    ranks = [
        subprocess.Popen(command, env=environment(**slurm, **port, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    assert len(metrics(tmp_path)) == 8
