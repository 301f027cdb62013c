"""Tiny random models that take images, saved with the processor that transformers has for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

VOCAB, IMAGE = 128, 100
EDGE, PATCH = 32, 8
SPECIAL = {
    IMAGE: "<image>",
    101: "<fake_token_around_image>",
    102: "<global-img>",
    **{103 + 4 * y + x: f"<row_{y + 1}_col_{x + 1}>" for y in range(4) for x in range(4)},
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": EDGE,
    "patch_size": PATCH,
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} w5 "
    "{% endfor %}"
)

# Family: the class of its configuration, and what differs from the fields above.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "smolvlm": ("SmolVLMConfig", {"scale_factor": 2, "image_token_id": IMAGE}),
    "llava": (
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": IMAGE,
            "image_seq_length": 16,
        },
    ),
}


def make(family: str, directory: Path) -> tuple[torch.nn.Module, Any]:
    """Write a model and its processor; return both, the model in float32."""
    class_name, differences = CASES[family]
    rest = dict(differences)
    seen = {**VISION, **rest.pop("vision_config", {})}
    config = getattr(transformers, class_name)(
        text_config=TEXT, vision_config=seen, pad_token_id=0, **rest
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    model = model.float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                size = value[0].numel()
                spread = 0.3 if "embed" in name else 1.5 * size**-0.5
                value.copy_(torch.randn_like(value) * spread)
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    _processor(family, directory).image_processor.save_pretrained(directory)
    return load(family, directory)


def load(family: str, directory: Path) -> tuple[torch.nn.Module, Any]:
    """Return a model in float32 and its processor, as transformers reads them back."""
    read = transformers.AutoModelForImageTextToText.from_pretrained
    model = read(directory, attn_implementation="eager").float().eval()
    return model, _processor(family, directory)


def _processor(family: str, directory: Path) -> Any:
    file = str(directory / "tokenizer.json")
    return PROCESSORS[family](transformers.PreTrainedTokenizerFast(tokenizer_file=file))


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer that knows one word a token, a line's end, and the special ones."""
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB - 3)}
    words |= {"\n": VOCAB - 3, "\n\n": VOCAB - 2, "user": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL.values()]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def _smolvlm(tokenizer: Any) -> Any:
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * EDGE}, max_image_size={"longest_edge": EDGE}
    )
    # SmolVLM's own processor makes the same text, and wants a package for videos.
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def _llava(tokenizer: Any) -> Any:
    square = {"height": EDGE, "width": EDGE}
    images = transformers.LlavaImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square)
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


PROCESSORS = {"smolvlm": _smolvlm, "llava": _llava}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def logits(model: torch.nn.Module, inputs: Any) -> np.ndarray:
    """Return float32 [tokens, vocab] of what a processor made."""
    with torch.no_grad():
        return model(**inputs).logits[0].float().numpy()
