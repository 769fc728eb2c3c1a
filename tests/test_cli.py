"""The command `meru-fast`: help, errors, and the commands that live nowhere else."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import meru

import meru_fast
from meru_fast import checkpoint, cli, config
from meru_fast.commands import completion
from meru_fast.evaluation import catalog

SMALL = Path(__file__).parent / "evaluation" / "small_meru.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "meru_fast.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys; from meru_fast import cli; status = cli.main(['--help']);"
        "heavy = {'torch', 'numpy', 'omegaconf', 'rich', 'PIL'} & set(sys.modules);"
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 5
    for name, (text, _) in cli.COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    """By its own name, with examples, in lines that a terminal shows."""
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: meru-fast {name} ")
    assert f"  meru-fast {name}" in text.partition("usage: ")[2] or f'"$(meru-fast {name}' in text
    assert max(map(len, text.splitlines())) <= 120


def test_no_command_prints_the_help_and_a_wrong_one_the_choices(capsys):
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "'train'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0


def test_an_error_is_one_line_and_debug_shows_where(tmp_path, capsys):
    missing = str(tmp_path / "nothing.pth")
    arguments = ["export", "--checkpoint-path", missing, "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr().err
    assert captured == f"error: {missing}: no such file or folder (--debug shows where)\n"
    assert cli.main(["--debug", *arguments]) == 1
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert captured.splitlines()[-1] == f"error: {missing}: no such file or folder"
    # commands that report their errors through sys.exit keep their cause for --debug
    walk = ["traverse", "--image-path", "x.png", "--checkpoint-path", missing]
    assert cli.main(walk) == 1
    assert capsys.readouterr().err == f"error: {missing}: no such file or folder\n"
    assert cli.main([*walk, "--debug"]) == 1
    assert "CheckpointError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["train", "--config", "{}/nothing.py"], "nothing.py"),
        (["evaluate", "--config", "{}/nothing.py", "--checkpoint-path", "x.pth"], "nothing.py"),
        (["report", "--checkpoint-path", "x.pth", "--gallery", "{}/nothing.json"], "nothing.json"),
        (["index", "{}/nothing.tar"], "nothing.tar"),
        (["verify", "{}/nothing.tar"], "nothing.tar"),
        (["plot", "{}/nothing"], "nothing"),
    ],
)
def test_every_command_has_a_line_for_an_error_and_a_traceback_for_debug(tmp_path, capsys, arguments, fault):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert cli.main(arguments) in (1, 2)
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert fault in captured
    assert len(captured.splitlines()) == 1
    assert cli.main([*arguments, "--debug"]) in (1, 2)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_exit_statuses_reach_the_shell(tmp_path):
    assert run("plot", str(tmp_path)).returncode == 1
    done = run("verify", str(tmp_path / "*.tar"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_a_missing_package_is_named_with_the_fix(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "index", ("", "package_that_is_nowhere:main"))
    assert cli.main(["index"]) == 1
    assert "needs the package 'package_that_is_nowhere', which is not installed: pip install" in capsys.readouterr().err


def test_info_tells_what_runs_and_why_not(capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert report["packages"]["meru_fast"]
    ops = report["ops (meru_fast.ops)"]
    assert set(ops) == {"requested", "cuda", "cpu"}
    if not torch.cuda.is_available():
        assert "no CUDA device" in ops["cuda"]
        assert "no GPU and driver can be used" in report["gpu"]["none"]
        assert "gloo" in report["backends"]["training"]
    assert all("GiB free" in line for line in report["disk"].values())
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "deepspeed" in text
    assert "xformers" in text


def test_datasets_are_listed_with_their_state(tmp_path, capsys):
    assert cli.main(["datasets", "--data-dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(catalog.ENTRIES)
    assert len(rows) == 22
    assert {row["state"] for row in rows} == {"missing"}
    assert cli.main(["datasets", "--brief", "--data-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"missing     classification  split as published  {tmp_path}/cifar10" in text
    assert f"0 of 22 present in {tmp_path}" in text
    (tmp_path / "mnist" / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "mnist" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").touch()
    assert cli.main(["datasets", "--data-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for title in ("state", "looked for", "split", "licence", "how to get it"):
        assert len(re.findall(rf"^  {title}  +\S", text, re.MULTILINE)) == 22
    assert "incomplete, original layout" in text
    assert "differs, because the published images were" in text
    assert cli.main(["datasets", "flickr30k", "--data-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("flickr30k: ")
    assert "flickr30k_images" in text
    assert cli.main(["datasets", "imagenette"]) == 2
    assert "unknown dataset 'imagenette'; known: imagenet," in capsys.readouterr().err
    assert cli.main(["datasets", "--download"]) == 2
    assert "needs the names" in capsys.readouterr().err


def test_export_writes_what_load_reads(tmp_path, capsys):
    model = meru()
    source = tmp_path / "small.pth"
    checkpoint.save_published(source, model.state_dict(), iteration=7)
    common = ["export", "--checkpoint-path", str(source), "--train-config", str(SMALL)]
    assert cli.main([*common, "--output", str(tmp_path / "export")]) == 0
    assert "step 7" in capsys.readouterr().out
    again, info = checkpoint.load_model(tmp_path / "export")
    assert info.iteration == 7
    assert dict(config.load(SMALL).model.visual).items() <= dict(info.model.visual).items()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    back = ["--checkpoint-path", str(tmp_path / "export"), "--output", str(tmp_path / "b.pth")]
    assert cli.main(["export", *back]) == 0
    assert torch.load(tmp_path / "b.pth", weights_only=True)["iteration"] == 7


def test_plot_draws_runs(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "metrics.csv").write_text(
            f"step,loss,curv\n1,{number + 2},1\n2,{number + 1},0.9\n"
        )
    runs = [str(tmp_path / "run0"), str(tmp_path / "run1")]
    output = tmp_path / "pictures" / "both.svg"
    assert cli.main(["plot", *runs, "--output", str(output)]) == 0
    assert output.read_text().count("<svg") == 1
    assert cli.main(["plot", *runs, "--metrics", "losss"]) == 1
    assert "no run has a metric 'losss'; there are loss, curv" in capsys.readouterr().err
    assert cli.main(["plot", *runs, "--output", "x.doc"]) == 2
    assert cli.main(["plot", str(tmp_path)]) == 1


def test_bench_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meru_fast, "__file__", str(tmp_path / "site-packages" / "meru_fast" / "__init__.py"))
    assert cli.main(["bench"]) == 1
    assert "not part of the installed package: clone the repository" in capsys.readouterr().err


def test_completion_completes(tmp_path):
    script = tmp_path / "complete.bash"
    script.write_text(completion.bash({name: completion.options_of(name) for name in ("info", "train", "traverse")}))

    def complete(*words: str) -> set[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        line = (
            f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _meru_fast; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
        assert not done.stderr
        return set(done.stdout.split())

    assert complete("meru-fast", "tra") == {"train", "traverse"}
    assert "--image-path" in complete("meru-fast", "traverse", "--")
    assert complete("meru-fast", "train", "--num-g") == {"--num-gpus"}
    assert "train_meru_vit_s" in complete("meru-fast", "train", "--config", "train_meru")
    lines = completion.fish({"info": ["--help", "--json"]}).splitlines()
    assert lines[1] == "complete -c meru-fast -n '__fish_seen_subcommand_from info' -l help"
