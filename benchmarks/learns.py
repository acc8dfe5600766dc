"""Does it learn? A tiny model goes through text, I, II and III on builds whose answers only pictures tell.

    python benchmarks/learns.py [--out DIR] [--scale F] [--json FILE]

Corpora in upstream formats are drawn (`learns_sets`), built by the pipeline into four builds, and trained on by the
trainer, each stage from the one before. After each stage the model answers held-out samples, built by the same recipes
from other pictures, and answers them once more with all pictures blank. Stage III is done twice, with replay and
without. An answer counts if each of its tokens is the likeliest.

The vision tower starts from a few minutes of classifying marks, which stands for CLIP's pretraining, and is frozen in
all stages, as in the paper.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch  # noqa: TID253
from learns_sets import ANIMALS, COLOURS, PLACES, SHAPES, mark, striped, write_corpora
from torch.nn import functional as F  # noqa: TID253

from formats.tokens import IGNORED, ChatTokenizer
from model.config import LongLlavaConfig, named_config
from model.feed import Feed
from model.longllava import LongLlavaForConditionalGeneration
from model.packing import Packing
from model.saved import load_model
from model.train import TrainSettings, train
from model.vision import encode
from pipelines.build import Request, build
from pipelines.demo.tokenizer import train_tokenizer
from pipelines.executor import Executor
from pipelines.progress import Progress
from recipes.schema import Recipe

COUNTS = {"facts": 2000, "captions": 600, "looks": 1200, "details": 400, "pictures": 500, "clips": 500}
EXAM = {"facts": 100, "captions": 1, "looks": 100, "details": 51, "pictures": 50, "clips": 50}
EXAMINED = ("text", "single_image", "details", "multi_image")
LENGTH = 1024
RATES = {"text": 3e-3, "align": 3e-3, "single_image": 3e-3, "multi_image": 3e-3}
EPOCHS = {"text": 2, "align": 1, "single_image": 2, "multi_image": 1}
CHANCE = {"fact": 0.25, "colour": 0.25, "shape": 0.25, "picture": 0.5, "second": 0.5, "tile": 0.5}
QUESTIONS = tuple(CHANCE)


def recipes(tokenizer: Path, count: Mapping[str, int]) -> list[Recipe]:
    """The paper's four stages in small; stage II has two builds, so that sub-images can be drawn from one of them."""
    details, llm = count["details"] - 1, ["projector", "llm"]
    components: dict[str, tuple[dict[str, Any], list[str]]] = {
        "text": ({"facts": {"source": "evol_instruct", "count": "all"}}, llm),
        "align": ({"captions": {"source": "sharegpt4v", "count": "all"}}, ["projector"]),
        "single_image": ({"looks": {"source": "llava15", "count": "all"}}, llm),
        "details": ({"details": {"source": "mantis", "count": "all", "filters": {"modality": ["image"]}}}, llm),
        "multi_image": (
            {
                "picture": {"source": "mantis", "count": "all", "filters": {"modality": ["multi_image"]}},
                "second": {"source": "videochat2", "count": "all"},
                "tile": {"subimage": "details", "count": details, "max_tiles": 2},
            },
            llm,
        ),
        "replay": (
            {
                "single_image_replay": {"replay": "single_image", "count": count["looks"] // 3},
                "text_replay": {"replay": "text", "count": count["facts"] // 3},
            },
            llm,
        ),
    }
    return [
        Recipe.model_validate(
            {
                "name": name,
                "tokenizer": str(tokenizer),
                "sequence_length": LENGTH,
                "samples_per_shard": 200,
                "components": mix,
                "training": {"trainable": trainable, "isolate": True, "global_batch": 1, "warmup_ratio": 0.05},
            }
        )
        for name, (mix, trainable) in components.items()
    ]


def built(folder: Path, seed: int, count: dict[str, int], tokenizer: Path, only: tuple[str, ...] = ()) -> None:
    """Draws corpora and builds recipes from them; makes the tokenizer if there is none."""
    if not (folder / "drawn").exists():
        texts = write_corpora(folder / "data", seed, count)
        if not (tokenizer / "tokenizer.json").exists():
            train_tokenizer(
                [*texts, *[w for w in (*COLOURS, *SHAPES, *PLACES, *ANIMALS) for _ in range(99)]], tokenizer
            )
        (folder / "drawn").touch()
    for recipe in recipes(tokenizer, count):
        if only and recipe.name not in only:
            continue
        build(Request(recipe, folder, str(folder / "data"), folder / recipe.name, folder / "catalog"), Progress())


def start(folder: Path, tokenizer: Path, steps: int) -> None:
    """A random model whose tower has learnt to tell marks apart, and stripes from none; saved to `folder`."""
    if (folder / "config.json").exists():
        return
    chat = ChatTokenizer.load(str(tokenizer))
    fields = named_config("tiny").to_dict() | {"image_token_id": chat.image_token_id}
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    fields["text_config"] |= {
        "vocab_size": chat.vocabulary_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LongLlavaForConditionalGeneration(LongLlavaConfig(**fields))
    _look_at_marks(model, steps)
    model.save_pretrained(folder)
    chat.copy_to(folder)


def _look_at_marks(model: LongLlavaForConditionalGeneration, steps: int, batch: int = 12) -> None:
    rng, tower = Random(7), model.model.vision_tower
    head = torch.nn.Linear(model.config.vision_config.hidden_size, 9)
    parameters = [*tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(steps):
        truth = torch.tensor([[rng.randrange(4), rng.randrange(4), rng.random() < 0.3] for _ in range(batch)])
        shown = [
            np.asarray(striped(rng, 0).crop((0, 0, 336, 336)) if flat else mark(rng, COLOURS[colour], SHAPES[shape]))
            for colour, shape, flat in truth.tolist()
        ]
        said = head(encode(tower, torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)).mean(1))
        marks = truth[:, 2] == 0
        loss = F.cross_entropy(said[marks, :4], truth[marks, 0]) + F.cross_entropy(said[marks, 4:8], truth[marks, 1])
        loss = loss + F.binary_cross_entropy_with_logits(said[:, 8], truth[:, 2].float())
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()


@torch.inference_mode()
def exam(model_folder: Path, builds: list[Path]) -> dict[str, dict[str, float]]:
    """Shares of right answers by question, of a model that sees and of one whose pictures are blank."""
    model = load_model(model_folder)
    right: dict[str, dict[str, list[bool]]] = {"seeing": defaultdict(list), "blind": defaultdict(list)}
    feed = Feed(builds)
    for sequence in feed:
        pixels = sequence.images.permute(0, 3, 1, 2) if len(sequence.images) else None
        packing = Packing.of(sequence.cu_seqlens.tolist())
        for view, answers in right.items():
            blank = pixels is not None and view == "blind"
            shown = torch.zeros(pixels.shape) if blank else pixels  # zeros after normalising: CLIP's mean colour
            likeliest = model(sequence.input_ids[None], shown, packing=packing).logits[0].argmax(-1)
            for i, (begin, end) in enumerate(zip(sequence.cu_seqlens[:-1], sequence.cu_seqlens[1:], strict=True)):
                labels = sequence.labels[begin + 1 : end]
                target = labels != IGNORED
                component = feed.blend.column("component")[int(sequence.rows[i])].as_py()
                word = feed.tokenizer.decode(labels[target].tolist())
                hit = bool((likeliest[begin : end - 1][target] == labels[target]).all())
                answers[_question(component, word)].append(hit)
    return {view: {q: round(sum(a[q]) / len(a[q]), 3) for q in QUESTIONS} for view, a in right.items()}


def _question(component: str, answer: str) -> str:
    if component == "facts":
        return "fact" if answer in ANIMALS else "reading"
    if component == "looks":
        return "colour" if answer in COLOURS else "shape"
    return component


def stage(out: Path, name: str, builds: list[Path], init: Path, **options: Any) -> Path:
    """Trains a stage by its recipe, with this experiment's rate, and returns the model."""
    chosen = {"learning_rate": RATES[name], "epochs": EPOCHS[name], "beta2": 0.95, "save_every": 10**6} | options
    return train(TrainSettings(tuple(map(str, builds)), out, init=init, tensorboard=False, seed=1, **chosen))


def run(out: Path, scale: float) -> list[dict[str, Any]]:
    """All stages; a row of accuracies for each."""
    count = {kind: max(12, round(n * scale)) for kind, n in COUNTS.items()}
    learn, held_out, tokenizer = out / "learn", out / "exam", out / "tokenizer"
    with Executor(workers=2):
        built(learn, 1, count, tokenizer)
        built(held_out, 2, EXAM, tokenizer, EXAMINED)
    start(out / "start", tokenizer, round(300 * scale))
    questions = [held_out / name for name in ("text", "single_image", "multi_image")]
    stages = {
        "text": ("text", ["text"], "start"),
        "I": ("align", ["align"], "text/final"),
        "II": ("single_image", ["single_image", "details"], "I/final"),
        "III": ("multi_image", ["multi_image", "replay"], "II/final"),
        "III without replay": ("multi_image", ["multi_image"], "II/final"),
    }
    rows = [{"stage": "none", "cpu_s": 0, **exam(out / "start", questions)}]
    for name, (recipe, builds, init) in stages.items():
        before = time.process_time()
        final = stage(out / name, recipe, [learn / b for b in builds], out / init)
        rows.append({"stage": name, "cpu_s": round(time.process_time() - before), **exam(final, questions)})
        print(table(rows[-1:]) if len(rows) > 2 else table(rows), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies in per cent, those of the blind in brackets."""
    lines = []
    for row in rows:
        cells = [f"{row['seeing'][q]:.0%} ({row['blind'][q]:.0%})" for q in QUESTIONS]
        lines.append(" | ".join([f"| {row['stage']:18}", *cells, f"{row['cpu_s']} s |"]))
    return "\n".join(lines)


def main() -> None:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("learns"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = run(options.out, options.scale)
    print(f"\nseeing (blind)\n| stage | {' | '.join(QUESTIONS)} | CPU |")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"scale": options.scale, "chance": CHANCE, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
