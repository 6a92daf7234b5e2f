"""Which parameters move: a scope of a traced model, under a preconditioner or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from .._arguments import scope_pattern
from ..model.trace import Tracer
from ..sequences import Batch, Chi
from . import products
from .memory import MEMORY
from .parts import By, Parts
from .products import Direction
from .sides import Side

CH2 = "ch2"


def select(tracer: Tracer, scope: str) -> dict[str, str]:
    """Which uses of which tensors a scope moves: name of the use -> name of the tensor.

    "full" is every trainable tensor at all its uses; "readout" the output embedding where it makes logits; "backbone" all
    uses before it (a tied embedding as lookup). A regular expression takes the tensors that it finds under any of their
    names, at all their uses.

    Raises:
        ValueError: the expression is not valid, nothing trainable is in the scope, or the scope is "ch2", which moves nothing.
    """
    if scope == CH2:
        raise ValueError('scope="ch2" is an estimate of the force matrix, by td.forces alone: no parameter moves by it')
    uses = {use: tensor for use, tensor in tracer.owner.items() if tensor in tracer.trainable}
    head = {tracer.readout.weight_name, tracer.readout.bias_name}
    if scope == "readout":
        uses = {use: tensor for use, tensor in uses.items() if use in head}
    elif scope == "backbone":
        uses = {use: tensor for use, tensor in uses.items() if use not in head}
    elif scope != "full":
        pattern = scope_pattern(scope)
        wanted = {tensor for use, tensor in uses.items() if pattern.search(use)}
        uses = {use: tensor for use, tensor in uses.items() if tensor in wanted}
    if not uses:
        some = ", ".join(list(tracer.owner)[:3])
        raise ValueError(f"scope {scope!r} holds no trainable parameter; the model's are named like {some}, …")
    return uses


@dataclass(frozen=True)
class Scope:
    """A traced model and what moves of it.

    Attributes:
        tracer: the model.
        uses: name of a use of a tensor -> name of the tensor, of all uses that move.
        P: the diagonal preconditioner by tensor, or None for the identity.
        parts: how F is divided by what moves, or None where it is not.
    """

    tracer: Tracer
    uses: dict[str, str]
    P: Direction | None
    parts: Parts | None = field(default=None, kw_only=True)

    @classmethod
    def named(cls, tracer: Tracer, scope: str, by: By | None = None) -> Scope:
        """What users call a scope and its parts, without a preconditioner.

        Raises:
            ValueError: see `select` and `Parts.named`.
        """
        uses = select(tracer, scope)
        return cls(tracer, uses, None, parts=None if by is None else Parts.named(tracer, uses, by))

    @property
    def moves_readout_alone(self) -> bool:
        """Whether the readout's weight moves as readout, with its bias or not, and nothing else does."""
        head = {self.tracer.readout.weight_name, self.tracer.readout.bias_name}
        return self.P is None and self.tracer.readout.weight_name in self.uses and self.uses.keys() <= head

    def require_no_padding_row(self, side: str, chis: Sequence[Chi]) -> None:
        """Raise if a text holds an id whose row gets no gradient as a lookup (`padding_idx`) but moves with the tied readout.

        Raises:
            ValueError: one does: what its gradients say of that row is not what a step does to it.
        """
        head, model = self.uses.get(self.tracer.readout.weight_name), self.tracer.model
        lookups = [(f"{name}.weight", of) for name, of in model.named_modules() if isinstance(of, nn.Embedding)]
        padding = {of.padding_idx for use, of in lookups if head is not None and self.uses.get(use) == head} - {None}
        for i, chi in enumerate(chis):
            if found := padding.intersection(chi.ids.tolist()):
                raise ValueError(
                    f"sequence {i} of {side} holds the token {found.pop()} inside its text, the embedding's padding_idx: "
                    "autograd gives its row no gradient as an input, and yet the readout, which is the same tensor, moves it, "
                    "so that no gradient predicts what a step does there. Take the token out of the text"
                )

    def coverage(self, name: str, rules: Mapping[str, str]) -> dict[str, str]:
        """Every parameter name of the model with the rule it took part by, or why it takes no part in a scope of this name."""

        def rule(use: str, tensor: str) -> str:
            if use in self.uses:
                return rules.get(use, "autograd")
            return f"outside scope {name!r}" if tensor in self.tracer.trainable else "frozen"

        found = {use: rule(use, tensor) for use, tensor in self.tracer.owner.items()}
        return found | dict.fromkeys(self.tracer.opaque, "frozen")

    def vjp(self, side: Side, memory: int = MEMORY) -> Direction:
        """Σ_n J_nᵀ Γ_n, without P; see products.vjp."""
        return products.vjp(self.tracer, side, self.uses, memory)

    def vjp_each(self, side: Side, start: int = 0, stop: int | None = None) -> Iterator[Direction]:
        """J_nᵀ Γ_n token by token, without P."""
        return products.vjp_each(self.tracer, side, self.uses, start, stop)

    def preconditioned(self, direction: Direction) -> Direction:
        """P ⊙ direction."""
        return products.preconditioned(direction, self.P)

    def jvp(self, side: Side, direction: Direction) -> Float[Tensor, " N"]:
        """<Γ_n, J_n θ̇> of every token of a side."""
        return products.jvp(self.tracer, side, direction, self.uses)

    def jvp_logits(self, batch: Batch, direction: Direction) -> tuple[Tensor, Tensor]:
        """Logits and their velocity along a direction, each [N, V]."""
        return products.jvp_logits(self.tracer, batch, direction, self.uses)
