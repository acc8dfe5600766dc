"""What a model is made of: a Hugging Face configuration, and the ones that come with the project."""

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, JambaConfig, PreTrainedConfig

from formats.errors import UsageError
from model.vision import Pooling

FOLDER = Path(__file__).with_name("configs")

CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""CLIP ViT-L/14-336."""


class LongLlavaConfig(PreTrainedConfig):
    """A CLIP tower, a projector and a Jamba language model.

    Args:
        vision_config: of `CLIPVisionConfig`, as an object or a dictionary; ViT-L/14-336 by default.
        text_config: of `JambaConfig`, likewise. One expert makes every layer dense (the 9B model).
        token_pooling: how an image's patches become fewer tokens.
        image_seq_length: tokens of an image: 144 (2-D or 1-D pooling), 36 (2-D), 576 (none).
        image_token_id: the id that stands for one token of an image; an unused one of the vocabulary
            (`formats.tokens.IMAGE_TOKEN`), or one beyond it.

    Raises:
        UsageError: if pooling and token count disagree.
    """

    model_type = "longllava"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": JambaConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        text_config: JambaConfig | dict[str, Any] | None = None,
        token_pooling: Pooling = "2d",
        image_seq_length: int = 144,
        image_token_id: int = 516,
        **kwargs: Any,
    ) -> None:
        vision, text = vision_config or CLIP, text_config or {}
        self.vision_config = CLIPVisionConfig(**vision) if isinstance(vision, dict) else vision
        self.text_config = JambaConfig(**text) if isinstance(text, dict) else text
        self.token_pooling = token_pooling
        self.image_seq_length = image_seq_length
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        patches = patches_of(self.vision_config)
        square = round(self.image_seq_length**0.5) ** 2 == self.image_seq_length
        possible = {"2d": square, "1d": True, None: self.image_seq_length == patches}
        if self.token_pooling not in possible:
            raise UsageError(f"config: token_pooling is {self.token_pooling!r}; it can be '2d', '1d' or null")
        if not possible[self.token_pooling] or not 1 <= self.image_seq_length <= patches:
            raise UsageError(
                f"config: image_seq_length {self.image_seq_length} cannot come from {patches} patches with"
                f" token_pooling {self.token_pooling!r}; try '2d' with 144 or 36, '1d' with 144, null with 576"
            )


def named_config(name: str) -> LongLlavaConfig:
    """A configuration of this project (`53b`, `9b`, `tiny`) or of a folder that holds a config.json.

    Raises:
        UsageError: if there is none.
    """
    file = FOLDER / f"{name}.json"
    if file.is_file():
        config: LongLlavaConfig = LongLlavaConfig.from_json_file(file)
        return config
    if (Path(name) / "config.json").is_file():
        return folder_config(Path(name))
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.json")))
    raise UsageError(f"model {name!r}: neither one of {known} nor a folder with a config.json")


def folder_config(folder: Path) -> LongLlavaConfig:
    """The configuration of a saved model.

    Raises:
        UsageError: if it is another kind of model's.
    """
    fields, _ = LongLlavaConfig.get_config_dict(folder)
    if fields.get("model_type") != LongLlavaConfig.model_type:
        raise UsageError(
            f"{folder}/config.json: model_type is {fields.get('model_type')!r}, not 'longllava';"
            " `longllava convert` brings the authors' checkpoints into this layout"
        )
    return LongLlavaConfig(**fields)


def patches_of(vision: CLIPVisionConfig) -> int:
    """Patches of one square image."""
    side, patch = vision.image_size, vision.patch_size
    assert isinstance(side, int)
    assert isinstance(patch, int)
    return (side // patch) ** 2
