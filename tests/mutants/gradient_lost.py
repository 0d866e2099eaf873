"""Right values, but the gradient of the latents is lost; a kind without a pattern has nothing else that would tell."""

from effzoo.attention import register
from effzoo.attention.perceiver import Perceiver

KILLED_BY = "gradients_are_derivatives"


@register("mutant")
class Mutant(Perceiver):
    """Latent attention that detaches its latents in a float64 sum."""

    def latent_queries(self):
        latents = super().latent_queries()
        return latents.detach() + 0.5 * (latents - latents.detach())
