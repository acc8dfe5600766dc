"""Curation: which records a recipe calls junk, how many each step drops, and when that is too many.

Texts are scored while annotations are read (`formats.textscore`), so their steps are conditions on the catalog and drop
records before the draw. Pictures are scored when they are opened; a record that fails there is rejected like any other
that cannot be used, with the step's name as its reason, and the next in line takes its place. An earlier build's index
has all scores, so for replay and sub-images every step is a condition on it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from formats.errors import BuildError, Reason, Reject
from formats.imaging import EncodedImage
from recipes.schema import Recipe, Steps

_TEXT = {
    "min_words": "n_words >= {}",
    "max_words": "n_words <= {}",
    "min_answer_words": "shortest_answer >= {}",
    "max_turn_words": "longest_turn <= {}",
    "max_repetition": "repetition <= {}",
    "max_refusals": "n_refusals <= {}",
    "max_emails": "n_emails <= {}",
    "max_phones": "n_phones <= {}",
    "max_cards": "n_cards <= {}",
}
_PICTURE: Mapping[str, tuple[Reason, str, bool, str]] = {
    "min_side": ("min-side", "min_side", True, "the shortest side has {:,} pixels"),
    "max_side": ("max-side", "max_side", False, "the longest side has {:,} pixels"),
    "max_aspect": ("max-aspect", "max_aspect", False, "one side is {:.2f} times the other"),
    "min_contrast": ("min-contrast", "contrast", True, "its contrast is {}"),
    "min_bytes": ("min-bytes", "min_bytes", True, "the file has {:,} bytes"),
    "max_bytes": ("max-bytes", "max_bytes", False, "the file has {:,} bytes"),
}
"""Of each step: its reason, its score, whether the score must be at least (or at most) its value, and what to say."""

PICTURE_REASONS: Mapping[str, str] = {reason: step for step, (reason, *_) in _PICTURE.items()}
"""The steps of the rejects that are drops."""


# Before the draw ----------------------------------------------------------------------------------------------------


def conditions(steps: Steps, *, of_index: bool) -> dict[str, str]:
    """What a record must not be known to break, as SQL by the step's name; a flag's step is called by the flag.

    Args:
        steps: of one component.
        of_index: for an earlier build's index, which knows pictures too; for a catalog otherwise.
    """
    found = {flag: f"NOT list_contains(flags, {_text(flag)})" for flag in steps.drop_flags or ()}
    for step, sql in _TEXT.items():
        if (value := getattr(steps, step)) is not None:
            found[step] = sql.format(value)
    if steps.answer_languages:
        found["answer_languages"] = f"answer_language IN ({', '.join(map(_text, steps.answer_languages))})"
    if steps.same_language:
        found["same_language"] = "NOT language_mismatch"
    for step, (_, score, at_least, _) in _PICTURE.items():
        if of_index and (value := getattr(steps, step)) is not None:
            found[step] = f"{score} {'>=' if at_least else '<='} {value}"
    return found


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# When the media are open --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PictureScores:
    """What is known of a record's pictures and clips, by the names of the index's columns; None without any.

    Attributes:
        min_side, max_side: the shortest and longest side of all, in pixels.
        max_aspect: the largest ratio of a longer side to its shorter one.
        contrast: of the blankest; a clip's is that of its best frame.
        min_bytes, max_bytes: sizes of the pictures' files; clips do not count.
        width, height: of the picture or clip with the most pixels, the first of several.
    """

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    contrast: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    width: int | None = None
    height: int | None = None


def picture_scores(groups: Sequence[Sequence[EncodedImage]], sizes: Sequence[int]) -> PictureScores:
    """Scores a record's media.

    Args:
        groups: the images that each of them has become.
        sizes: of the pictures' files, in bytes.
    """
    if not groups:
        return PictureScores()
    shapes = [image.source_size for group in groups for image in group]
    width, height = max(shapes, key=lambda shape: shape[0] * shape[1])
    best = [max(known) for group in groups if (known := [i.contrast for i in group if i.contrast is not None])]
    return PictureScores(
        min_side=min(min(shape) for shape in shapes),
        max_side=max(max(shape) for shape in shapes),
        max_aspect=round(max(max(shape) / min(shape) for shape in shapes), 4),
        contrast=min(best, default=None),
        min_bytes=min(sizes, default=None),
        max_bytes=max(sizes, default=None),
        width=width,
        height=height,
    )


def refuse_junk(scores: PictureScores, steps: Steps) -> None:
    """Raises `Reject` for the first step that the scores break."""
    for step, (reason, name, at_least, saying) in _PICTURE.items():
        limit, score = getattr(steps, step), getattr(scores, name)
        if limit is None or score is None:
            continue
        if score < limit if at_least else score > limit:
            raise Reject(reason, f"{saying.format(score)}; {step} is {limit}")


# The budget ---------------------------------------------------------------------------------------------------------


def drop_share(pool: int, dropped: Mapping[str, int]) -> float:
    """How much of what a component selects its steps drop."""
    total = sum(dropped.values())
    return total / (pool + total) if total else 0.0


Drops = Mapping[str, tuple[int, Mapping[str, int]]]
"""Of each component, the records that steps on texts leave, and how many each of them drops."""


def refuse_overdrawn(recipe: Recipe, drops: Drops) -> None:
    """Stops a build whose steps drop more than they may, before any media is opened.

    Raises:
        BuildError: with a table of the steps for each component beyond its budget.
    """
    beyond = {name: drop for name, drop in drops.items() if drop_share(*drop) > recipe.budget(name)}
    tables = [
        f"components.{name}: filters drop {drop_share(pool, dropped):.1%} of {pool + sum(dropped.values()):,} records;"
        f" max_drop is {recipe.budget(name):.1%}\n{_lines(dropped, pool + sum(dropped.values()))}"
        for name, (pool, dropped) in beyond.items()
    ]
    if tables:
        raise BuildError("\n".join([*tables, _remedy(beyond)]))


def _lines(dropped: Mapping[str, int], total: int) -> str:
    """A table of what each step drops, the largest first."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"    {step:<18}{count:>12,}{count / total:>9.1%}" for step, count in ordered)


def _remedy(names: Iterable[str]) -> str:
    allowed = " ".join(f"--set components.{name}.max_drop=1" for name in names)
    return f"Loosen the step that drops most, or allow it with {allowed}"


_FEWEST = 200
_SIGMAS = 5


class PictureBudget:
    """Watches what the steps on pictures drop while a build is at work.

    What the steps on texts have left of the budget is theirs: all steps together may drop no more than `max_drop`.
    Shards are a fair sample, so a build stops as soon as it is beyond doubt that the drawn records break the budget:
    when more are dropped than of all drawn may be, or when after 200 the share is five standard deviations over.
    """

    def __init__(self, recipe: Recipe, drops: Drops) -> None:
        self._recipe = recipe
        self._drops = drops
        self._drawn: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = {name: Counter() for name in drops}

    def expect(self, drawn: Mapping[str, int]) -> None:
        """So many more records of each component are drawn."""
        self._drawn.update(drawn)

    def saw(self, seen: Mapping[str, int], dropped: Mapping[str, int]) -> None:
        """What came of one shard's records: how many of each component, and drops by "component/reason".

        Raises:
            BuildError: if a component's budget is broken.
        """
        self._seen.update(seen)
        for key, count in dropped.items():
            component, _, reason = key.partition("/")
            self._dropped[component][PICTURE_REASONS[reason]] += count
        beyond = [name for name in seen if self._is_beyond_doubt(name)]
        if beyond:
            raise BuildError("\n".join([*map(self._table, beyond), _remedy(beyond)]))

    def _is_beyond_doubt(self, name: str) -> bool:
        dropped, seen, share = self._dropped[name].total(), self._seen[name], self._left(name)
        if dropped > share * self._drawn[name] + 1e-6:
            return True
        return seen >= _FEWEST and dropped / seen > share + _SIGMAS * sqrt(share * (1 - share) / seen)

    def _left(self, name: str) -> float:
        """The share of the records that steps on texts leave that those on pictures may drop."""
        used = drop_share(*self._drops[name])
        return max(0.0, 1 - (1 - self._recipe.budget(name)) / (1 - used)) if used < 1 else 0.0

    def _table(self, name: str) -> str:
        before, texts = drop_share(*self._drops[name]), self._drops[name][1]
        dropped, seen = self._dropped[name], self._seen[name]
        share = before + (1 - before) * dropped.total() / seen
        lines = f"{_lines(dropped, seen)}\n    of {seen:,} records opened so far"
        if texts:
            total = self._drops[name][0] + sum(texts.values())
            lines = f"{_lines(texts, total)}\n    of {total:,} records, and of what is left\n{lines}"
        budget = self._recipe.budget(name)
        return f"components.{name}: filters drop {share:.1%}; max_drop is {budget:.1%}\n{lines}"
