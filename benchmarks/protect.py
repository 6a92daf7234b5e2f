"""What `protect` costs a training of the demo model in transformers.Trainer: with it and without it in turn, in one run.

    python benchmarks/protect.py [--loss dpo|sft] [--rounds 5] [--json FILE] [--quick]

One round trains some steps plainly and as many with the probe protected, AdamW, from the same weights on the same batches. The
first step of each is left out: Adam has no state in it, and forces are then those of the plain gradient. Seconds are of whole
optimizer steps, by the clock and in processor time (all threads; the steadier one on a busy machine).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path


def made(args: argparse.Namespace, folder: str):
    """A Trainer of the demo model on random tokens, its probe, and a list that gets (clock, processor) seconds of its steps."""
    import torch
    from torch.nn.functional import logsigmoid

    sys.path[:] = [p for p in sys.path if Path(p) != Path(__file__).parent]  # kernels.py is not the package of that name
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    from tokdyn.loading import load_model
    from tokdyn.testing import random_chis

    model = load_model("demo")[0].train()
    V, T = model.config.vocab_size, args.length
    prompt = T // 4
    ids = torch.randint(2, V, (4 * args.batch, T), generator=torch.Generator().manual_seed(0))
    rows = [dict(input_ids=x, labels=torch.where(torch.arange(T) < prompt, -100, x)) for x in ids]
    full, rest = divmod(args.probe, T - prompt)
    probe = random_chis([(prompt, T - prompt)] * full + [(prompt, rest)] * (rest > 0), vocabulary=V, seed=1)
    steps: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *args, **kwargs):
            steps.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    def loss(outputs, labels, **options):
        lp = outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        lp = lp * (labels[:, 1:] >= 0)
        chosen, rejected = lp.sum(1).chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean() if args.loss == "dpo" else -lp.sum() / (labels >= 0).sum()

    options = TrainingArguments(
        folder, max_steps=args.steps + 1, per_device_train_batch_size=args.batch, learning_rate=1e-5, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, options, default_data_collator, rows, compute_loss_func=loss, callbacks=[Clock()], processing_class=None
    )
    return trainer, probe, steps


def block(protected: bool, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of each step after the first, (by the clock, of the processor)."""
    from tokdyn.integrations.intervene import protect

    with tempfile.TemporaryDirectory() as folder:
        trainer, probe, steps = made(args, folder)
        if protected:
            protect(trainer, probe, share=0.1)
        trainer.train()
    return steps[1:]


def main() -> None:
    """Measure, and print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (twice the pairs)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, the first quarter unscored")
    parser.add_argument("--probe", type=int, default=512, help="scored tokens of the probe")
    parser.add_argument("--steps", type=int, default=3, help="steps of a kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.length, args.probe, args.steps, args.rounds = 2, 16, 24, 1, 1
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads, float32")
    print(f"demo model, {args.loss}, {args.batch} sequences of {args.length} tokens, probe of {args.probe} tokens")
    block(True, args)  # warm-up
    ratios: dict[str, list[float]] = {"clock": [], "processor": []}
    seconds: dict[str, list[float]] = {"plain": [], "protected": []}
    for _ in range(args.rounds):
        plain, protected = ([statistics.median(x) for x in zip(*block(on, args), strict=True)] for on in (False, True))
        for i, name in enumerate(ratios):
            ratios[name].append(protected[i] / plain[i])
        seconds["plain"].append(plain[1])
        seconds["protected"].append(protected[1])
    for name, values in seconds.items():
        print(f"{name:10} {statistics.median(values):.3f} s of the processor a step")
    for name, values in ratios.items():
        print(f"protected / plain, {name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps(dict(settings=settings, figures=dict(ratio=ratios, seconds=seconds)), indent=1) + "\n")


if __name__ == "__main__":
    main()
