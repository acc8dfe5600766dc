"""LongLLaVA: a CLIP tower whose patches are pooled, a projector, and a hybrid of Mamba and attention.

Saved and loaded the Hugging Face way (`from_pretrained`, `save_pretrained`, safetensors), with transformers' parameter
names: `model.vision_tower.…`, `model.multi_modal_projector.…`, `model.language_model.layers.…`, `lm_head.weight`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils.generic import ModelOutput

from model.cache import HybridCache
from model.config import LongLlavaConfig
from model.hybrid import Experts, HybridModel, MambaMixer
from model.loss import TokenLosses, token_losses
from model.packing import Packing
from model.projector import Projector
from model.vision import encode, pool

# Files hold each expert by itself, as Jamba's do on the hub; in memory they are fused. Both are read.
register_checkpoint_conversion_mapping(
    LongLlavaConfig.model_type, get_checkpoint_conversion_mapping("jamba"), overwrite=True
)


@dataclass
class LongLlavaOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: scalar, the mean over supervised tokens; with labels.
        logits: [batch, kept, vocabulary].
        token_losses: float32 [supervised], each supervised token's loss, for losses by source; with labels.
        token_positions: [supervised], where those tokens stand in the flattened batch; with labels.
        balance: scalar, the mean over layers of experts of `model.hybrid.load_balance`; when training such a model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    token_positions: Tensor | None = None
    balance: Tensor | None = None


class LongLlavaModel(nn.Module):
    """Everything but the head."""

    def __init__(self, config: LongLlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = HybridModel(config.text_config)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images as embeddings.

        Args:
            pixel_values: [images, 3, 336, 336], uint8 or normalised.

        Returns:
            [images, tokens of an image, hidden].
        """
        patches = encode(self.vision_tower, pixel_values)
        pooled = pool(patches, self.config.token_pooling, self.config.image_seq_length)
        features: Tensor = self.multi_modal_projector(pooled)
        return features

    def features(self, pixel_values: Tensor | None) -> Tensor | None:
        """Image features one after another, [image tokens, hidden], or None without images.

        When training, a batch without images runs a blank one and keeps nothing of it: every process of a sharded
        model then takes part in the same collectives, and every parameter gets a gradient, here of zeros.
        """
        if pixel_values is not None:
            return self.image_features(pixel_values).flatten(0, 1)
        if not self.training:
            return None
        side = self.config.vision_config.image_size
        device = self.language_model.final_layernorm.weight.device
        blank = torch.zeros((1, 3, side, side), device=device)  # type: ignore[arg-type]
        return self.image_features(blank).flatten(0, 1)[:0]

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embeddings of text, with image features where the ids say that an image stands.

        Args:
            input_ids: [batch, length].
            features: [image tokens, hidden], in the order in which they stand in the flattened batch.

        Raises:
            ValueError: if there are not exactly as many features as places for them.
        """
        is_image = input_ids == self.config.image_token_id
        embeds: Tensor = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
        places = is_image.flatten().nonzero().squeeze(1)
        given = 0 if features is None else len(features)
        if len(places) != given:
            each = self.config.image_seq_length
            raise ValueError(
                f"input_ids has {len(places)} image positions ({len(places) / each:g} images of {each} tokens), but"
                f" {given / each:g} images are given; whoever made the inputs counted images another way"
            )
        if features is None:
            return embeds
        return embeds.flatten(0, 1).index_copy(0, places, features.to(embeds.dtype)).view_as(embeds)


class LongLlavaForConditionalGeneration(PreTrainedModel):
    """The whole model."""

    config: LongLlavaConfig
    config_class = LongLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["HybridLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "mamba.D"]  # noqa: RUF012

    def __init__(self, config: LongLlavaConfig) -> None:
        super().__init__(config)
        self.model = LongLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        packing: Packing | None = None,
        attention_mask: Tensor | None = None,
        cache: HybridCache | None = None,
        logits_to_keep: int | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: None = None,
    ) -> LongLlavaOutput:
        """One pass.

        1. CLIP encodes the images; patches are pooled; the projector brings them to the language model's width.
        2. Text is embedded, and image features are put where the image id stands.
        3. The hybrid layers run, keeping packed samples (or padding) apart.
        4. With labels: the loss of each supervised token, a chunk of positions at a time.
        5. Logits of the last `logits_to_keep` positions.

        Args:
            input_ids: [batch, length]; an image is its id repeated `image_seq_length` times.
            pixel_values: [images, 3, 336, 336] in order of appearance, uint8 (normalised here) or normalised.
            labels: [batch, length], the tokens themselves, -100 where nothing is to be learnt.
            packing: which samples share rows; absent, whole rows are one sample each.
            attention_mask: [batch, length], 0 at padding, on either side; for rows without packing.
            cache: what was read before; it grows by these tokens.
            logits_to_keep: 0 for all; by default all without labels, none with labels.
            use_cache, return_dict, inputs_embeds: as transformers' callers pass them; only False, True and None.

        Raises:
            ValueError: if one of those is something else, or if ids and images disagree.
        """
        _refuse(use_cache, return_dict, inputs_embeds)
        if attention_mask is not None and packing is None:
            packing = Packing.of_mask(attention_mask)
        features = self.model.features(pixel_values)  # 1
        embeds = self.model.embed(input_ids, features)  # 2
        balances: list[Tensor] = []
        hidden = self.model.language_model(embeds, packing, cache, balances)  # 3
        losses = None if labels is None else token_losses(hidden, labels, self.lm_head, packing)  # 4
        kept = logits_to_keep is not None or labels is None
        logits = self.lm_head(hidden[:, -(logits_to_keep or 0) :]) if kept else None  # 5
        return _output(losses, logits, torch.stack(balances).mean() if balances else None)

    def new_cache(self, capacity: int, batch: int = 1) -> HybridCache:
        """An empty cache for so many tokens."""
        norms = [layer.input_layernorm.weight for layer in self.model.language_model.layers]
        devices = [norm.device for norm in norms]  # `device_map` may spread layers
        return HybridCache(self.config.text_config, batch, capacity, norms[0].dtype, devices)

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Prompts and what the model says to them, [batch, length + new]; short rows are padded at their end.

        Args:
            input_ids, pixel_values, attention_mask: as in `forward`.
            options: of `model.generate.Settings`, and those of transformers' that mean the same.

        Raises:
            ValueError: if an option is one that this model does not have.
        """
        from model.generate import generate_rows, settings_of

        return generate_rows(self, input_ids, pixel_values, attention_mask, settings_of(options))

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings."""
        table: nn.Module = self.model.language_model.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the table of word embeddings."""
        self.model.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.lm_head
        return head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        std = self.config.text_config.initializer_range
        if isinstance(module, MambaMixer):
            n = module.A_log.shape[1]
            init.copy_(module.A_log, torch.log(torch.arange(1.0, n + 1)).expand_as(module.A_log))
            init.ones_(module.D)
            init.copy_(module.dt_proj.bias, _first_steps(module.dt_proj.bias))
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


def _first_steps(bias: Tensor) -> Tensor:
    """Biases whose softplus goes from 0.001 to 0.1, evenly in the logarithm (Gu and Dao 2023, section 3.6).

    A state then remembers from ten to a thousand tokens; biases of zero would let it forget within two.
    """
    step = torch.logspace(-3, -1, len(bias), device=bias.device)
    return step + torch.log(-torch.expm1(-step))


def _refuse(use_cache: bool | None, return_dict: bool | None, inputs_embeds: object) -> None:
    if use_cache:
        raise ValueError(
            "use_cache=True: a forward pass makes no cache; pass cache=model.new_cache(TOKENS), or generate"
        )
    if return_dict is False:
        raise ValueError("return_dict=False: the result has names; result.to_tuple() has none")
    if inputs_embeds is not None:
        raise ValueError(
            "inputs_embeds: embeddings are made of input_ids; model.model.language_model takes them as such"
        )


def _output(losses: TokenLosses | None, logits: Tensor | None, balance: Tensor | None) -> LongLlavaOutput:
    if losses is None:
        return LongLlavaOutput(logits=logits, balance=balance)
    return LongLlavaOutput(losses.mean(), logits, losses.losses, losses.positions, balance)


AutoConfig.register(LongLlavaConfig.model_type, LongLlavaConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(LongLlavaConfig, LongLlavaForConditionalGeneration, exist_ok=True)
