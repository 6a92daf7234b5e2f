"""The sides of exact_forces.py: tokdyn's engines, one forward and backward pass, bergson and kronfluence, on one model.

A side is a function of (update, observed) sequences that returns its matrix or vector and how many parameters took part.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

LINEAR = r"\.layers\.\d+\..*_proj\."  # what the peers cover of this model: the backbone's linear layers
OURS, PLAIN = "tangent", "forward+backward"
PEERS = ("bergson", "kronfluence")


class Size(NamedTuple):
    """Tokens per sequence and side, vocabulary, width, layers, sequences per side."""

    length: int
    vocabulary: int
    width: int
    layers: int
    batch: int = 1

    def model(self) -> Any:
        """A random model of Qwen2 shape; the same on every side."""
        return qwen2(self.vocabulary, self.width, self.layers)

    def texts(self) -> list[Any]:
        """Update and observed sequences: one token of prompt, the rest scored."""
        from tokdyn.testing import random_chis

        return [random_chis([(1, self.length)] * self.batch, seed=seed, vocabulary=self.vocabulary) for seed in (1, 2)]

    def small(self) -> Size:
        """What a side warms up with."""
        return self._replace(length=min(8, self.length), batch=1)

    def labels(self) -> dict[str, Any]:
        """Its columns in the table."""
        return self._asdict()

    def side(self, name: str, model: Any, args: argparse.Namespace, scope: str, folder: str) -> Callable:
        """The side of this name: "tangent", "naive", "reduce=AXIS", "by=PARTS", a peer, or "forward+backward"."""
        match name.partition("="):
            case ("reduce", _, axis):
                return tokdyn_side(model, scope=scope, reduce=axis)
            case ("by", _, parts):
                return matrix_side("tangent", model, args, scope=scope, by=parts)
            case ("bergson", _, _):
                return bergson_side(model, args, folder)
            case ("kronfluence", _, _):
                return kronfluence_side(model, args, folder)
            case ("forward+backward", _, _):
                return plain_side(model)
            case _:
                return matrix_side(name, model, args, scope=scope)


def qwen2(vocabulary: int, width: int, layers: int) -> Any:
    """A random model of Qwen2 shape, tied."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=int(2.75 * width), vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def matrix_side(name: str, model: Any, args: argparse.Namespace, **options: Any) -> Callable:
    """The matrix by the method "tangent" or "naive", within the memory that the command line gives it."""
    memory = args.naive_memory if name == "naive" else args.memory
    return tokdyn_side(model, memory=memory << 20, method=name, **options)


def tokdyn_side(model: Any, **options: Any) -> Callable:
    """td.forces with these options."""
    import tokdyn as td

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        result = td.forces(model, update, observe, **options)
        moving = [name for name, rule in result.coverage.items() if rule != "frozen" and not rule.startswith("outside scope")]
        tensors = {id(p): p.numel() for p in map(model.get_parameter, moving)}
        return result.matrix if result.vector is None else result.vector, sum(tensors.values())

    return run


def plain_side(model: Any) -> Callable:
    """One forward and backward pass of the update, gradients of all parameters."""
    import torch

    def run(update: Any, observe: Any) -> tuple[None, int]:
        ids = torch.stack([chi.ids for chi in update])
        z = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad()
        return None, sum(p.numel() for p in model.parameters())

    return run


def bergson_side(model: Any, args: argparse.Namespace, folder: str) -> Callable:
    """bergson's token_influence="output": query gradients by its collector, then a tangent pass for each."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.data import allocate_batches, pad_and_tensor
    from bergson.score.output_influence import output_token_influence, query_directions
    from datasets import Dataset

    tokens = max(args.peer_tokens or 2048, args.length + 1)  # 2048 is its default
    cfg = IndexConfig(run_path=f"{folder}/index", include_bias=True, token_batch_size=tokens)
    cfg.partial_run_path.mkdir(parents=True)
    model.requires_grad_(False)  # as bergson sets a model up: hooks take what they need
    model.get_input_embeddings().requires_grad_(True)

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        (u,), (o,) = ([chi.ids.tolist() for chi in side] for side in (update, observe))
        documents = [o if args.whole else o[: t + 1] for t in range(1, len(o))]
        labels = [[-100] * t + [o[t]] + [-100] * (len(ids) - t - 1) for t, ids in enumerate(documents, 1)]
        queries = Dataset.from_dict(dict(input_ids=documents, labels=labels, length=[len(ids) for ids in documents]))
        model.set_attn_implementation("sdpa")
        collector = InMemoryCollector(
            model=model.base_model, data=queries, cfg=cfg, processor=GradientProcessor(include_bias=cfg.include_bias)
        )
        batches = allocate_batches(queries["length"][:], cfg.token_batch_size)
        CollectorComputer(model, queries, collector=collector, batches=batches, cfg=cfg).run_with_collector_hooks()
        model.set_attn_implementation("eager")  # as bergson does: the fused one has no forward derivative
        grads = {name: g.T for name, g in collector.gradients.items()}
        x, y, _, _ = pad_and_tensor([u], labels=[u], sync_max_len=False)
        rates, _ = output_token_influence(model, x, y, query_directions(model, grads, collector.target_info), cfg)
        return rates[0].T, sum(len(g) for g in grads.values())

    return run


def kronfluence_side(model: Any, args: argparse.Namespace, folder: str) -> Callable:
    """kronfluence's pairwise scores without a preconditioner, one example per loss token."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    tracked = [name for name, m in model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)]
    covered = sum(p.numel() for name in tracked for p in model.get_submodule(name).parameters())

    class TokenLoss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            ids, last, targets = batch
            h = model.model(ids).last_hidden_state[torch.arange(len(ids)), last]
            return torch.nn.functional.cross_entropy(model.lm_head(h), targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

    def collate(examples: list[tuple[Any, int]]) -> tuple[Any, Any, Any]:
        ids = [ids if args.whole else ids[:t] for ids, t in examples]
        targets = torch.stack([ids[t] for ids, t in examples])
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([t - 1 for _, t in examples]), targets

    task = TokenLoss()
    analyzer = Analyzer("tokens", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.fit_all_factors("identity", [], factor_args=FactorArguments(strategy="identity"))

    def run(update: Any, observe: Any) -> tuple[Any, int]:
        (u,), (o,) = ([chi.ids for chi in side] for side in (update, observe))
        train, query = ([(ids, t) for t in range(1, len(ids))] for ids in (u, o))
        examples = max(1, (args.peer_tokens or 8192) // len(u))
        analyzer.compute_pairwise_scores(
            "scores", "identity", query, train, examples, examples, dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
            score_args=ScoreArguments(query_gradient_accumulation_steps=len(query)), overwrite_output_dir=True,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"], covered

    return run
