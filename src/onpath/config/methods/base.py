"""What the options of all methods have in common: the per-token objective. No torch."""

from typing import Literal

from pydantic import Field

from onpath.config.section import Section
from onpath.losses.objective import Kind, Objective

Divergence = Kind


class LossOptions(Section):
    """The per-token objective; the names are those of `onpath.losses.Objective`."""

    divergence: Divergence = "reverse_kl"
    """reverse_kl is KL(student‖teacher), forward_kl KL(teacher‖student); sampled is the policy gradient on
    the sampled token; cross_entropy and negative_advantage (a control) use no teacher."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Teacher's weight in the Jensen-Shannon mixture; jensen_shannon only."""
    support: Literal["full", "teacher_topk", "student_topk", "union"] = "full"
    """Vocabulary entries that the divergence runs over."""
    support_k: int = Field(32, ge=1)
    """k of a top-k support."""
    tail: Literal["renormalise", "bucket"] = "bucket"
    """What a top-k support does with the mass outside it: drop and renormalise, or one bucket for the rest.
    """
    entry_clip: float | None = Field(None, gt=0)
    """Cap each vocabulary entry's contribution before summing (OPSD uses 0.05); null is off."""
    token_clip: float | None = Field(None, gt=0)
    """Cap each token's summed divergence (TRD's baselines use 0.06 to 0.1); null is off."""
    reweight: Literal["none", "teacher_entropy", "student_entropy", "divergence"] = "none"
    """Weigh tokens by a statistic of theirs, normalised to mean 1 over the micro-batch-independent total."""
    first_tokens: int | None = Field(None, ge=1)
    """Train only on the first so many response tokens; null trains on all."""
    ppo_clip: float | None = Field(None, gt=0)
    """Clip range of the importance ratio; sampled only."""
    discount: float = Field(0.0, ge=0, le=1)
    """Weight of future log-ratios in a token's advantage; 0 is the token's own; sampled only."""

    def objective(self) -> Objective:
        """The loss that these options describe.

        Raises:
            ValueError: a combination that is known to be wrong, with the reason.
        """
        return Objective(
            kind=self.divergence,
            beta=self.beta if self.divergence == "jensen_shannon" else None,
            support=self.support,
            k=self.support_k if self.support != "full" else None,
            tail=self.tail,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            ppo_clip=self.ppo_clip,
            discount=self.discount,
        )

    cosine_every: int = Field(0, ge=0)
    """Measure the cosine of consecutive steps' gradients every so many steps (keeps one copy); 0 never."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that every training prompt must have."""
        return ()

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher."""
        return False
