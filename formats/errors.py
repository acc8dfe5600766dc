"""Every exception that this project raises on purpose.

    LongLlavaError
    ├── UsageError       something the user gave cannot be used; the message says what, where and what to do
    │   ├── RecipeError      a recipe is wrong (all its problems at once)
    │   ├── SourceError      an upstream file is absent or is not what its name says
    │   └── BuildError       a build directory cannot be made, resumed or read
    │       └── DamageError      a sample of a finished build is not what its index says
    ├── TrainingError    a training run cannot go on; the message says why and what to try
    ├── ProtocolError    text that is not, or cannot become, well-formed protocol text
    └── Reject           one record cannot be used: costs that record, never the job

A `UsageError` ends a command with exit code 2; a `Reject` ends up in a ledger with its reason code.
"""

from typing import Literal, get_args

Reason = Literal[
    # Found while reading annotations.
    "bad-record",  # a field is absent or has the wrong type
    "bad-roles",  # turns do not alternate between human and assistant
    "no-answer",  # nothing in the record could be trained on
    "placeholders",  # more image placeholders than images
    "unsafe-path",  # a media path that is absolute, has a scheme or leaves its root
    # Found while reading media.
    "media-missing",  # no such file under any of the media's roots
    "media-unreadable",  # the file or its archive could not be read
    "unknown-format",  # the bytes are no image or video of a kind that is read here
    "broken-image",  # the decoder refused the image
    "broken-video",  # no frames, or too few of the promised frames, could be decoded
    "too-large",  # decoding would take more pixels or memory than allowed
    "timeout",  # the decoder did not finish in time
    "decoder-crash",  # the decoder's process died
    # Found while rendering.
    "too-long",  # does not fit the sequence length even after cutting
    # A recipe's filters of pictures, which are known only once the media are read.
    "min-side",  # a side of a picture or clip is too short
    "max-side",  # a side of a picture or clip is too long
    "max-aspect",  # a picture or clip is too long for its width
    "min-contrast",  # a picture, or every frame of a clip, is blank
    "min-bytes",  # the file of a picture is too small
    "max-bytes",  # the file of a picture is too large
]

REASONS: tuple[str, ...] = get_args(Reason)


class LongLlavaError(Exception):
    """Base of everything raised on purpose."""


class UsageError(LongLlavaError):
    """Something that the user gave cannot be used."""


class RecipeError(UsageError):
    """A recipe is wrong; the message lists every problem with file, line and key."""


class SourceError(UsageError):
    """An upstream file is absent, unreadable or not what its name says."""


class BuildError(UsageError):
    """A build directory cannot be made, resumed or read."""


class DamageError(BuildError):
    """A sample of a finished build is not what its index says."""


class TrainingError(LongLlavaError):
    """A training run cannot go on."""


class ProtocolError(LongLlavaError):
    """Text that is not, or cannot become, well-formed protocol text."""


class Reject(LongLlavaError):
    """One record cannot be used.

    Args:
        reason: one of `Reason`; what summaries count.
        detail: what a person needs to find and mend it.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8; ledgers are
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
