"""How a tower was built, as the config node that builds it again: what makes a model's config.json complete."""

from typing import Any

from torch import nn

from meru_fast import checkpoint, config


def recipe_of(module: nn.Module) -> dict[str, Any] | None:
    """The ``{"_target_": ..., arguments}`` that builds `module`, None if it does not carry one in ``module.recipe``."""
    return getattr(module, "recipe", None)


def from_recipe(recipe: dict[str, Any]) -> nn.Module:
    """Build a tower. A recipe may come from the Hub, so it can name nothing but what this package builds."""
    return config.instantiate(checkpoint.trusted_model(recipe, "recipe"))
