"""Hand out a checkpoint: safetensors with config and model card, or the published ``.pth`` layout."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from meru_fast import checkpoint, config
from meru_fast.checkpoint import CheckpointInfo

CARD = """
# {title}

{summary}

Drafted from the training run; please check it, and add what the run cannot know: intended use, limits, licence.

## Use

```python
import torch
from meru_fast.models import {kind}
from meru_fast.tokenizer import Tokenizer

model = {kind}.from_pretrained("PATH OR HUB ID")
images = torch.rand(1, 3, {image_size}, {image_size})  # RGB in [0, 1]
scores = model.similarity(model.encode_image(images), model.encode_text(Tokenizer()(["a photo of a dog"])))
```

## Model

{architecture}

## Training

{training}

## Evaluation

Not measured yet: `meru-fast evaluate --config eval_zero_shot_classification --checkpoint-path {title}`

## Citation

MERU: Desai, Nickel, Rajpurohit, Johnson, Vedantam. Hyperbolic Image-Text Representations. ICML 2023. arXiv:2304.09172
"""

SUMMARIES = {
    "lorentz": "Images and texts as points of a hyperboloid, compared by geodesic distance: a MERU model.",
    "cosine": "Images and texts as points of a sphere, compared by their angle: a CLIP model, the baseline of MERU.",
}


def export(
    checkpoint_path: str | os.PathLike,
    output: str | os.PathLike,
    model_config: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> CheckpointInfo:
    """Convert any checkpoint that ``checkpoint.load_model`` reads.

    Args:
        output: a file ending in ``.pth`` gets the published layout; anything else is a folder, which gets
            ``model.safetensors``, ``config.json`` and ``README.md``, as ``MERU.from_pretrained`` and the Hub expect.
        model_config, ema: see ``checkpoint.load_model``.

    Raises:
        CheckpointError, ConfigError: as ``checkpoint.load_model`` does.
    """
    output = Path(output)
    model, info = checkpoint.load_model(checkpoint_path, model_config, ema=ema)
    state = model.state_dict()
    if output.suffix == ".pth":
        checkpoint.save_published(output, state, info.iteration or 0, info.root)
    else:
        checkpoint.save_export(output, state, model.hub_config(), info.iteration, info.root)
        card(model, output.name, info).save(output / "README.md")
    return info


def card(model: Any, title: str, info: CheckpointInfo | None = None) -> ModelCard:
    """A draft of the model card, from the model and the run folder that its weights came from."""
    kind, recorded = type(model).__name__, model.hub_config()
    data = ModelCardData(
        library_name="meru_fast",
        pipeline_tag="zero-shot-image-classification",
        tags=["meru_fast", "hyperbolic" if model.geometry == "lorentz" else "clip", "contrastive-learning"],
    )
    rows = {"model": checkpoint.describe(recorded), "parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    rows |= {name: f"{model.scalar(name).item():.4g}" for name in model.scalar_bounds}
    body = CARD.format(
        title=title,
        summary=SUMMARIES[model.geometry],
        kind=kind,
        image_size=recorded["visual"].get("img_size", 224),
        architecture=_table(rows),
        training=_training(info),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _training(info: CheckpointInfo | None) -> str:
    if info is None or info.kind != "deepspeed":
        return "Not recorded."
    rows: dict[str, Any] = {"steps": f"{info.iteration:,}"} if info.iteration is not None else {}
    run = next(
        (folder for folder in info.file.resolve().parents if (folder / checkpoint.RUN_CONFIG_FILE).is_file()), None
    )
    if run is not None:
        recorded = config.load(run / checkpoint.RUN_CONFIG_FILE)
        for key in ("dataset.shards", "train.total_batch_size", "train.num_iterations", "train.amp", "train.seed"):
            rows[key] = config.OmegaConf.select(recorded, key)
        for key in ("lr", "betas", "weight_decay", "gain_bias_decay"):
            rows[f"optim.optimizer.{key}"] = config.OmegaConf.select(recorded, f"optim.optimizer.{key}")
        rows |= _last_metrics(run / "metrics.csv", info.iteration)
    return _table({name: value for name, value in rows.items() if value is not None})


def _last_metrics(file: Path, iteration: int | None) -> dict[str, str]:
    """What was logged at the exported step or last before it."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row.get("step", "").isdigit()]
    rows = [row for row in rows if iteration is None or int(row["step"]) <= iteration]
    wanted = ("loss", "contrastive_loss", "entailment_loss", "image_radius", "text_radius", "cone_violation")
    return {f"training {name}": f"{float(rows[-1][name]):.4g}" for name in wanted if rows and rows[-1].get(name)}


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
