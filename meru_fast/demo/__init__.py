"""The whole road in minutes: make data, train a small MERU through the DeepSpeed launcher, evaluate, show.

Start at ``run``, or ``meru-fast demo`` on the command line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meru_fast.files import whole

TRAIN_CONFIG, EVAL_CONFIGS = "demo_meru", ("demo_digits", "demo_scenes")
LEAST_ACCURACY = 0.85  # zero-shot, ten digits
LEAST_RECALL = 5.0  # text to image at 5, in multiples of chance


class DemoError(RuntimeError):
    """A stage that failed, or a model that did not learn."""


def run(output_dir: str | os.PathLike = "demo_output", overrides: Sequence[str] = ()) -> Path:
    """Run all stages; those that a former call finished are not run again.

    Args:
        output_dir: receives ``data/``, ``run/`` (the training run), ``results.json`` and ``report.html``.
        overrides: changes to the training config, such as ``train.num_iterations=500``.

    Returns:
        The report.

    Raises:
        DemoError: a stage failed, or the model did not learn what it should.
    """
    folder = Path(output_dir).resolve()
    began = time.monotonic()
    _say(1, "Data: scikit-learn's handwritten digits and drawn scenes, in shards of the RedCaps layout")
    data = _make_data(folder)
    _say(2, "Training: a small MERU, by the same trainer and launcher as any other run")
    run_folder = _train(folder, data, overrides)
    _say(3, "Evaluation: zero-shot classification of digits, retrieval of scenes, all held out")
    results = _evaluate(folder, data, run_folder)
    _say(4, "Report: radii, the map, retrieval, traversals")
    report = _report(folder, data, run_folder, results)
    _print_table(results)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Open {report}")
    faults = _faults(results)
    if faults:
        raise DemoError(f"the model did not learn: {'; '.join(faults)}")
    return report


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _make_data(folder: Path) -> Path:
    from meru_fast.demo.shards import make

    try:
        return make(folder / "data")
    except (OSError, ValueError) as error:
        raise DemoError(str(error)) from error


def _train(folder: Path, data: Path, overrides: Sequence[str]) -> Path:
    from meru_fast import config

    overrides = [f"dataset.shards={data / 'train' / '*.tar'}", *overrides]
    steps = config.load(TRAIN_CONFIG, overrides).train.num_iterations
    run_folder = folder / "run"
    if (run_folder / "checkpoints" / f"step_{steps:08d}" / "manifest.json").is_file():
        print(f"      {steps:,} steps are trained already: {run_folder}")
        return run_folder
    command = [sys.executable, "-m", "meru_fast.training", "--config", TRAIN_CONFIG, "--output-dir", str(run_folder)]
    command += ["--num-gpus", str(_processes()), "--resume", "auto", *overrides]
    print(f"      {' '.join(command[1:])}", flush=True)
    (folder / "results.json").unlink(missing_ok=True)  # of other weights than these will be
    status = _wait(subprocess.Popen(command))
    if status != 0:
        raise DemoError(f"training ended with status {status}; its log is {run_folder / 'logs' / 'rank0.log'}")
    return run_folder


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processes()} CPU processes"


def _processes() -> int:
    """One process on a GPU (the batch is small), else two on two cores or more."""
    import torch

    if torch.cuda.is_available():
        return 1
    return min(2, len(os.sched_getaffinity(0)))


def _wait(process: subprocess.Popen) -> int:
    """Wait for a process that gets the terminal's Ctrl-C too, so that it can stop in order."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _evaluate(folder: Path, data: Path, run_folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if path.is_file():
        print(f"      evaluated already: {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    from meru_fast import config
    from meru_fast.evaluation import cones
    from meru_fast.evaluation.checkpoints import load_model
    from meru_fast.evaluation.figures import read_log, training_minutes
    from meru_fast.evaluation.report import Gallery, Portrait, Subject

    model, _ = load_model(str(run_folder))
    results: dict[str, Any] = {}
    for name, root in zip(EVAL_CONFIGS, ("digits", "scenes.json"), strict=True):
        evaluator_config = config.load(name)
        evaluator_config.evaluator.datasets[0].root = str(data / root)
        results |= config.instantiate(evaluator_config.evaluator)(model)
    gallery = Gallery.load(data / "ladders.json")
    results["scenes"] = len(json.loads((data / "scenes.json").read_text()))
    portrait = Portrait(Subject("", model), gallery, gallery.captions, 0)
    results["image_radius"] = portrait.radii(portrait.images).mean().item()
    results["caption_radius"] = portrait.radii(portrait.captions).mean().item()
    results["curvature"] = cones.curvature(model)
    results["walks"] = [
        [gallery.ladders[index][-1], [stop.text for stop in portrait.walk(index)]] for index in gallery.sample(4)
    ]
    log = read_log(run_folder)
    results |= {"steps": int(log["step"][-1]), "training_minutes": training_minutes(log), "device": _device_name()}
    with whole(path) as partial:
        partial.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def _report(folder: Path, data: Path, run_folder: Path, results: dict[str, Any]) -> Path:
    from meru_fast.evaluation.checkpoints import load_model
    from meru_fast.evaluation.report import Gallery, Subject, write

    model, info = load_model(str(run_folder))
    print("      writing", folder / "report.html", flush=True)
    return write(
        folder / "report.html",
        [Subject("MERU", model, info.root, run_folder)],
        Gallery.load(data / "ladders.json"),
        title="What a small MERU learned",
        lead="A hyperbolic image-text model, trained in minutes on handwritten digits and drawn scenes whose captions "
        "run from general to specific. Everything below is measured on pictures that it has not seen.",
        facts=_facts(results),
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    chance = 5 / results["scenes"]
    recall = results["scenes/image_retrieval_recall@5"]
    return [
        (f"{results['digits/acc1']:.1%}", "zero-shot accuracy", "ten handwritten digits; chance is 10%"),
        (
            f"{recall:.1%}",
            "text to image, recall at 5",
            f"{recall / chance:.0f} times chance",
        ),
        (f"{results['scenes/text_retrieval_recall@5']:.1%}", "image to text, recall at 5", "the same scenes"),
        (f"{results['caption_radius']:.2f}", "mean distance of captions", "from the root of the embedding space"),
        (f"{results['image_radius']:.2f}", "mean distance of images", "farther out: they are more specific"),
        (f"{results['training_minutes']:.1f} min", "of training", f"{results['steps']:,} steps, {results['device']}"),
    ]


def _faults(results: dict[str, Any]) -> list[str]:
    accuracy, recall = results["digits/acc1"], results["scenes/image_retrieval_recall@5"]
    least_recall = LEAST_RECALL * 5 / results["scenes"]
    faults = []
    if not accuracy >= LEAST_ACCURACY:
        faults.append(f"zero-shot accuracy on digits is {accuracy:.1%}, expected at least {LEAST_ACCURACY:.0%}")
    if not recall >= least_recall:
        faults.append(f"text-to-image recall@5 is {recall:.1%}, expected at least {least_recall:.1%}")
    if not results["caption_radius"] < results["image_radius"]:
        faults.append("captions are not nearer to the root than images")
    return faults


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measured on held-out pictures", "value", "what it means")
    for value, name, note in _facts(results):
        table.add_row(name, value, note)
    Console().print(table)
    print("\nFrom a picture to the root of the space, reading the nearest text:")
    for caption, texts in results["walks"]:
        print(f"  [{caption}]  {' > '.join(texts)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``meru-fast demo``. Exits with 1 if the model did not learn, with 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="meru-fast demo",
        description="Make data, train a small MERU, evaluate it and write a report, in about ten minutes on two CPU\n"
        "cores (a GPU is used if there is one). Run it again to go on after an interruption.",
        epilog="examples:\n"
        "  meru-fast demo                                           everything, into demo_output/report.html\n"
        "  meru-fast demo --output-dir longer train.num_iterations=3000\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", default="demo_output", help="folder for all it makes (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the training config")
    args = parser.parse_args(argv)
    try:
        run(args.output_dir, args.overrides)
    except DemoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)
