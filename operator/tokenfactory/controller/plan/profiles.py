"""Which PowerProfile stands for a model on a product."""

from __future__ import annotations

from tokenfactory.api.actuators import Actuators
from tokenfactory.api.power_profile import PowerProfileSpec
from tokenfactory.api.token_factory import ModelSpec
from tokenfactory.controller.plan.world import World


def profile_of(world: World, model: ModelSpec, product: str) -> PowerProfileSpec | None:
    """The one that the model names, else the first that was measured with its image."""
    repository = model.nim.image.partition("@")[0].rsplit(":", 1)[0]
    for (_, name), profile in sorted(world.snapshot.profiles.items()):
        spec = profile.spec
        named = model.power_profile == name
        fits = model.power_profile is None and spec.model in {repository, repository.rsplit("/", 1)[-1]}
        if (named or fits) and spec.gpu_product in {product, product.replace(" ", "-")}:
            return spec
    return None


def actuators_of(world: World, model: ModelSpec, product: str) -> Actuators | None:
    """What a model's GPUs are set to besides their limit."""
    profile = profile_of(world, model, product)
    return profile.actuators if profile is not None else None
