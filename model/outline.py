"""What a run would do, without doing it: `longllava train --dry-run`."""

import math
import os
from dataclasses import asdict
from typing import Any

from model.prepare import configuration, shape_of
from model.stage import TrainSettings
from model.train import opened
from model.training_budget import counts, held, working
from model.world import placement


def outline(settings: TrainSettings, processes: int | None = None) -> dict[str, Any]:
    """A run's stage, size and memory.

    Args:
        settings: of the run.
        processes: that would share it; as many as this launch has if None.

    Raises:
        UsageError: where the run itself would raise it.
    """
    size = processes or placement(os.environ).size
    feed, stage = opened(settings, 0, size)
    shape = shape_of(configuration(settings, feed.tokenizer))
    count = counts(shape, stage.trainable)
    sequences = [len(feed.blend.epoch(epoch)) for epoch in range(stage.epochs)]
    images = max(int(feed.blend.samples.images[rows].sum()) for rows in feed.blend.epoch(0))
    return {
        "stage": stage.as_dict(),
        "run": {
            "builds": list(settings.builds),
            "samples": feed.blend.samples.tokens.size,
            "sequences": sum(sequences),
            "most_images_of_a_sequence": images,
            "steps": math.ceil(sum(sequences) / stage.global_batch),
            "sequences_of_a_process_in_a_step": stage.rounds(size),
            "trained_parameters": count.spread + count.whole,
            "frozen_parameters": count.spread_frozen + count.whole_frozen,
        },
        "processes": size,
        "memory": {
            **{f"{name}, held": bytes_ for name, bytes_ in asdict(held(shape, stage.trainable, size)).items()},
            **working(shape, stage.trainable, stage.sequence_length, settings.activation_checkpointing, images),
        },
    }
