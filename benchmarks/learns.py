"""Does it learn? A tiny model goes through text, I, II and III on builds whose answers only pictures tell.

    python benchmarks/learns.py [--out DIR] [--scale F] [--seed N] [--json FILE]

Corpora in upstream formats are drawn (`learns_sets`), built by the pipeline, and trained on by the trainer, each stage
from the one before. After each stage the model answers held-out samples, built by the same recipes from other pictures,
and answers them once more with all pictures blank. Stage III is done twice, with replay and without. An answer counts
if each of its tokens is the likeliest.

The vision tower starts from a minute of classifying marks, stripes and plain grey, one picture at a time, which stands
for CLIP's pretraining, and is frozen in all stages, as in the paper. DIR is gone on with if it has some of this.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch  # noqa: TID253
from learns_sets import ANIMALS, COLOURS, PLACES, SHAPES, SIDE, mark, striped, write_corpora
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

COUNTS = {"facts": 2000, "captions": 600, "looks": 1440, "details": 400, "pictures": 500, "clips": 500}
EXAM = {"facts": 160, "captions": 1, "looks": 192, "details": 80, "pictures": 80, "clips": 80}
EXAMINED = ("text", "single_image", "details", "multi_image")
CHANCE = {"fact": 0.25, "colour": 0.25, "shape": 0.25, "details": 0.5, "picture": 0.5, "second": 0.5, "tile": 0.5}
"""Of guessing among the right kind of answer; `details` asks about pictures as a whole what `tile` asks about tiles."""
QUESTIONS = tuple(CHANCE)
LOOKS = 400
"""Steps in which the tower learns to tell pictures apart, once."""
MARK, STRIPES, PLAIN = range(3)


def recipes(tokenizer: Path, count: Mapping[str, int]) -> list[Recipe]:
    """The paper's four stages in small.

    Stage II has two builds, so that sub-images can be drawn from one of them, and so has stage III, so that its replay
    can be left out.
    """
    replayed = {"single_image": count["looks"] // 3, "text": count["facts"] // 6}
    mixes: dict[str, dict[str, dict[str, Any]]] = {
        "text": {"facts": {"source": "evol_instruct"}},
        "align": {"captions": {"source": "sharegpt4v"}},
        "single_image": {"looks": {"source": "llava15"}},
        "details": {"details": {"source": "mantis", "filters": {"modality": ["image"]}}},
        "multi_image": {
            "picture": {"source": "mantis", "filters": {"modality": ["multi_image"]}},
            "second": {"source": "videochat2"},
            "tile": {"subimage": "details", "max_tiles": 2},
        },
        "replay": {
            "pictures": {
                "replay": "single_image",
                "count": replayed["single_image"],
                "filters": {"modality": ["image"]},
            },
            "texts": {"replay": "text", "count": replayed["text"]},
        },
    }
    return [
        Recipe.model_validate(
            {
                "name": name,
                "tokenizer": str(tokenizer),
                "sequence_length": 1024,
                "samples_per_shard": 200,
                "components": {key: {"count": "all"} | component for key, component in mix.items()},
                "training": {
                    "trainable": ["projector"] if name == "align" else ["projector", "llm"],
                    "learning_rate": 1e-3 if name in ("multi_image", "replay") else 3e-3,
                    "warmup_ratio": 0.05,
                    "epochs": 2 if name == "text" else 1,
                    "isolate": True,
                    "global_batch": 1,
                },
            }
        )
        for name, mix in mixes.items()
    ]


def built(folder: Path, seed: int, count: dict[str, int], tokenizer: Path, only: tuple[str, ...] = ()) -> None:
    """Draws corpora and builds recipes from them; makes the tokenizer if there is none."""
    drawn, wanted = folder / "drawn.json", json.dumps(count)
    if drawn.exists() and drawn.read_text() != wanted:
        raise SystemExit(f"{folder} was drawn with another --scale; give another --out, or remove it")
    if not drawn.exists():
        texts = write_corpora(folder / "data", seed, count)
        if not (tokenizer / "tokenizer.json").exists():
            answers = [*COLOURS, *SHAPES, *PLACES, *ANIMALS]
            train_tokenizer(texts + answers * 99, tokenizer)  # a token each
        drawn.write_text(wanted)
    for recipe in recipes(tokenizer, count):
        if only and recipe.name not in only:
            continue
        build(Request(recipe, folder, str(folder / "data"), folder / recipe.name, folder / "catalog"), Progress())


def start(folder: Path, tokenizer: Path, steps: int, seed: int) -> None:
    """A random model whose tower has looked at pictures, saved to `folder`."""
    if (folder / "config.json").exists():
        return
    chat = ChatTokenizer.load(str(tokenizer))
    fields = named_config("tiny").to_dict() | {"image_token_id": chat.image_token_id}
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    fields["text_config"] |= {
        "vocab_size": chat.vocabulary_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LongLlavaForConditionalGeneration(LongLlavaConfig(**fields))
    _look_at_pictures(model, steps)
    model.save_pretrained(folder)
    chat.copy_to(folder)


def _look_at_pictures(model: LongLlavaForConditionalGeneration, steps: int, batch: int = 12) -> None:
    """Teaches the tower a mark's colour and shape, and stripes from plain grey."""
    rng, tower = Random(7), model.model.vision_tower
    head = torch.nn.Linear(model.config.vision_config.hidden_size, len(COLOURS) + len(SHAPES) + 3)
    parameters = [*tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters)
    for step in range(steps):
        kinds = [MARK, *rng.choices((MARK, STRIPES, PLAIN), (4, 1, 1), k=batch - 1)]
        truth = torch.tensor([[rng.randrange(len(COLOURS)), rng.randrange(len(SHAPES)), kind] for kind in kinds])
        shown = torch.from_numpy(np.stack([_picture(rng, *row) for row in truth.tolist()]))
        patches = encode(tower, shown.permute(0, 3, 1, 2))
        seen = F.layer_norm(patches, patches.shape[-1:]).mean(1)  # no patch outweighs others, as in the language model
        said = head(seen).split([len(COLOURS), len(SHAPES), 3], dim=1)
        marks = truth[:, 2] == MARK
        parts = [F.cross_entropy(said[i][marks], truth[marks, i]) for i in (0, 1)]
        loss = sum(parts, F.cross_entropy(said[2], truth[:, 2]))
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()


def _picture(rng: Random, colour: int, shape: int, kind: int) -> np.ndarray:
    image = mark(rng, COLOURS[colour], SHAPES[shape]) if kind == MARK else striped(rng, 0 if kind == STRIPES else 1)
    return np.asarray(image.crop((0, 0, SIDE, SIDE)))


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
            shown = pixels
            if pixels is not None and view == "blind":
                shown = torch.zeros(pixels.shape)  # no bytes, so taken as normalised: CLIP's mean colour
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
    if component in QUESTIONS:
        return component
    if answer in ANIMALS:
        return "fact"
    kind = "colour" if answer in COLOURS else "shape"
    return kind if component == "looks" else "reading"


def run(out: Path, scale: float, seed: int) -> list[dict[str, Any]]:
    """All stages; a row of accuracies for each."""
    count = {kind: max(12, round(n * scale)) for kind, n in COUNTS.items()}
    learn, held_out, tokenizer = out / "learn", out / "exam", out / "tokenizer"
    with Executor(workers=2):
        built(learn, 1, count, tokenizer)
        built(held_out, 2, EXAM, tokenizer, EXAMINED)
    before = time.process_time()
    start(out / "start", tokenizer, round(LOOKS * scale), seed)
    questions = [held_out / name for name in EXAMINED]
    stages = {
        "text": (["text"], "start"),
        "I": (["align"], "text/final"),
        "II": (["single_image", "details"], "I/final"),
        "III": (["multi_image", "replay"], "II/final"),
        "III without replay": (["multi_image"], "II/final"),
    }
    looked = round(time.process_time() - before)
    rows = [{"stage": "none", "cpu_s": looked, **exam(out / "start", questions)}]
    for name, (builds, init) in stages.items():
        before = time.process_time()
        paths = tuple(str(learn / build) for build in builds)
        final = train(TrainSettings(paths, out / name, init=out / init, beta2=0.95, seed=seed, tensorboard=False))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("learns"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of samples")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(options.out, options.scale, options.seed)
    print(f"\nseeing (blind)\n| stage | {' | '.join(QUESTIONS)} | CPU |")
    print(table(rows))
    if options.json:
        facts = {"scale": options.scale, "seed": options.seed, "samples": EXAM, "chance": CHANCE}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
