"""How the bundled teacher and student were made: two small models, trained from scratch on demonstrations."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from onpath.gym.demos import Pieces
from onpath.gym.language import BOS, EOS, PAD, Language
from onpath.gym.vocab import LANGUAGE

SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4},
    "student": {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3},
}
IGNORE = -100
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Its length is in tokens, so that it does not depend on the machine's speed."""

    role: str
    tokens: int
    learning_rate: float = 3e-3
    muon_rate: float = 0.02
    batch_tokens: int = 3000
    warmup: int = 50
    decay: float = 0.35
    seed: int = 0
    language: Language = LANGUAGE


class Source(Protocol):
    """Where demonstrations come from."""

    def draw(self, rng: random.Random, progress: float) -> tuple[str, Pieces]:
        """The user's message and the response; `progress` runs from 0 to 1."""
        ...


def build_model(role: str, seed: int, language: Language = LANGUAGE) -> Any:
    """A fresh Qwen3 of a role's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = SHAPES[role]
    config = Qwen3Config(
        **shape,
        num_hidden_layers=4,
        vocab_size=len(language.tokens),
        num_key_value_heads=shape["num_attention_heads"],
        head_dim=32,
        max_position_embeddings=language.longest,
        tie_word_embeddings=True,
        pad_token_id=language.ids[PAD],
        bos_token_id=language.ids[BOS],
        eos_token_id=language.ids[EOS],
    )
    return Qwen3ForCausalLM(config)


def to_example(prompt: str, pieces: Pieces, language: Language = LANGUAGE) -> tuple[list[int], list[int]]:
    """Ids and labels of one demonstration."""
    context = language.context_ids(prompt)
    ids = [language.ids[token] for token, _ in pieces]
    return context + ids, [IGNORE] * len(context) + [
        i if trained else IGNORE for i, (_, trained) in zip(ids, pieces, strict=True)
    ]


def batches(
    draw: Callable[[], tuple[str, Pieces]],
    batch_tokens: int,
    rng: random.Random,
    language: Language = LANGUAGE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of about equal length: examples are drawn in hundreds, sorted, cut and shuffled."""
    pad = language.ids[PAD]
    while True:
        examples = [to_example(*draw(), language) for _ in range(800)]
        for group in by_length(rng, examples, lambda e: len(e[0]), batch_tokens):
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in group]),
            )


def by_length(
    rng: random.Random, some: Iterable[T], length: Callable[[T], int], batch_tokens: int
) -> list[list[T]]:
    """In groups of about equal length, padding counted, shuffled."""
    groups: list[list[T]] = [[]]
    for one in sorted(some, key=length):
        if (len(groups[-1]) + 1) * length(one) > batch_tokens:
            groups.append([])
        groups[-1].append(one)
    rng.shuffle(groups)
    return groups


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): learns in fewer tokens than AdamW here."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
        """One update."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(torch.lerp(p.grad, buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def orthogonalise(matrix: Tensor) -> Tensor:
    """Towards the nearest orthogonal matrix."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return out


def optimisers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, recipe.muon_rate), adam]


def update(model: Any, opts: Sequence[torch.optim.Optimizer], rates: Sequence[float], factor: float) -> None:
    """One step of all optimisers along the clipped gradient, at a share of their rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt, rate in zip(opts, rates, strict=True):
        opt.param_groups[0]["lr"] = rate * factor
        opt.step()
        opt.zero_grad()


def fit(model: Any, mixture: Source, recipe: Recipe, log: Callable[[str], None] = print) -> None:
    """Train a model in place: warm-up, constant rate, linear decay; loss over response tokens only."""
    opts = optimisers(model, recipe)
    base = [opt.param_groups[0]["lr"] for opt in opts]
    seen, step, losses, began = 0, 0, [], time.time()
    rng = random.Random(f"{recipe.role}/{recipe.seed}")
    source = batches(
        lambda: mixture.draw(rng, seen / recipe.tokens), recipe.batch_tokens, rng, recipe.language
    )
    while seen < recipe.tokens:
        ids, labels = next(source)
        done = seen / recipe.tokens
        factor = min(
            1.0, (step + 1) / recipe.warmup, (1 - done) / recipe.decay + 0.01 if recipe.decay else 1.0
        )
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        target = labels[:, 1:]
        kept = target != IGNORE
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), target[kept])
        loss.backward()
        update(model, opts, base, factor)
        seen, step = seen + ids.numel(), step + 1
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            spent = time.time() - began
            log(f"{recipe.role} step {step} tokens {seen} loss_nats {mean:.4f} seconds {spent:.0f}")


def save(model: Any, directory: Path, language: Language = LANGUAGE) -> None:
    """Write a Hugging Face directory: weights as safetensors, tokenizer, generation config."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(
        pad_token_id=language.ids[PAD],
        bos_token_id=language.ids[BOS],
        eos_token_id=language.ids[EOS],
        do_sample=True,
    )
    model.save_pretrained(directory, safe_serialization=True)
    language.tokenizer().save_pretrained(directory)
