"""Tokenizers and small text encoders of the compact model, in the file formats of FLUX.1."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import ALL, new_folder
from ..model.text_encoder import TextEncoder, save_encoder
from .drawings import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    random_scene,
)
from .optimise import check_finite

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

CLIP_LENGTH = 77
T5_LENGTH = 32
WIDTH = 128
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "texture": TEXTURES,
    "relation": ("none", *RELATIONS),
    "other shape": tuple(SHAPES),
    "other colour": tuple(COLOURS),
}
INCOMPLETE_SHARE = 0.1  # of the training captions
UNSAID = -100  # the label that cross_entropy ignores


class Tokenizers(NamedTuple):
    """The two tokenizers of a FLUX.1 pipeline."""

    clip: CLIPTokenizer
    t5: T5TokenizerFast


# Tokenizers


def build_tokenizers(folder: str | Path) -> Tokenizers:
    """Write the compact model's tokenizers and return them as loaded from their files.

    Every word of the drawings' captions is one token in both. CLIP's is a byte-level BPE, so any
    text has an exact spelling; T5's is a unigram over words and ASCII, the rest is <unk>.

    Args:
        folder: gets `tokenizer/` (CLIP, 77 tokens) and `tokenizer_2/` (T5, 32 tokens).

    Returns:
        What `load_tokenizers(folder)` returns.
    """
    words = _caption_words()
    with new_folder(Path(folder) / "tokenizer", ALL) as path:
        _write_clip_tokenizer(words, path)
    with new_folder(Path(folder) / "tokenizer_2", ALL) as path:
        _write_t5_tokenizer(words, path)
    return load_tokenizers(folder)


def load_tokenizers(folder: str | Path) -> Tokenizers:
    """Load `tokenizer/` and `tokenizer_2/` of a folder in the layout of diffusers."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    return Tokenizers(
        CLIPTokenizer.from_pretrained(str(Path(folder) / "tokenizer"), local_files_only=True),
        T5TokenizerFast.from_pretrained(str(Path(folder) / "tokenizer_2"), local_files_only=True),
    )


def _caption_words() -> list[str]:
    """All words of the drawings' captions, sorted."""
    rng = np.random.default_rng(0)
    texts = [" ".join(names) for names in ATTRIBUTES.values()]
    for i in range(4000):
        texts.append(caption(random_scene(rng), rng, complete=i % 4 > 0))
    return sorted(set(re.findall(r"[a-z]+", " ".join(texts).lower())))


def _write_clip_tokenizer(words: list[str], folder: Path) -> None:
    from transformers import CLIPTokenizer

    merges = _merges(words)
    letters = _byte_letters()
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += list(dict.fromkeys(first + second for first, second in merges))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, as in FLUX.1


def _byte_letters() -> list[str]:
    """The 256 letters that stand for the bytes, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges, in order, that make each of the words one token.

    The commonest pair of neighbours is merged first, the alphabetically later one of equals: the
    trainer of the tokenizers library breaks such ties by chance.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(pair)
        spellings = [_merged(spelling, pair) for spelling in spellings]
    return merges


def _merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    """The spelling with each occurrence of the pair, from the left, made one piece."""
    pieces: list[str] = []
    i = 0
    while i < len(spelling):
        step = 2 if tuple(spelling[i : i + 2]) == pair else 1
        pieces.append("".join(spelling[i : i + step]))
        i += step
    return pieces


def _write_t5_tokenizer(words: list[str], folder: Path) -> None:
    from transformers import T5TokenizerFast

    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    vocab += [(letter, -10.0) for letter in letters]
    vocab += [(word, -4.0) for word in words if len(word) > 1]  # after a hyphen
    vocab += [("▁" + word, -4.0) for word in words]
    tokenizer = T5TokenizerFast(
        vocab=vocab,
        extra_ids=0,
        model_max_length=T5_LENGTH,
        _spm_precompiled_charsmap=_lower_case_map(),
    )
    tokenizer.save_pretrained(str(folder))


def _lower_case_map() -> bytes:
    """SentencePiece's precompiled map (a double-array trie and its strings) of A-Z to a-z.

    A lower-casing normalizer of another kind is lost when transformers loads a T5 tokenizer.
    """
    units = [0] * 1024
    units[0] = 256 << 10  # the root's children: unit 256 ^ letter
    for i, letter in enumerate(range(ord("A"), ord("Z") + 1)):
        units[256 ^ letter] = (512 << 10) | 1 << 8 | letter  # has a leaf: unit 768 ^ letter
        units[768 ^ letter] = 1 << 31 | 2 * i  # where its string begins
    strings = b"".join(bytes([letter, 0]) for letter in range(ord("a"), ord("z") + 1))
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + strings


# Encoders


def build_encoders(tokenizers: Tokenizers, seed: int = 0) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Build the untrained text encoders: two layers of width 128 each.

    Args:
        tokenizers: give the vocabulary sizes and the special tokens.
        seed: of the initial weights; the global random state is left as it was.

    Returns:
        CLIP, whose `pooler_output` is [B, 128], and T5, whose `last_hidden_state` is [B, L, 128].
    """
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_config = CLIPTextConfig(
        vocab_size=len(tokenizers.clip),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizers.clip.bos_token_id,
        eos_token_id=tokenizers.clip.eos_token_id,
        pad_token_id=tokenizers.clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(tokenizers.t5),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = CLIPTextModel(clip_config), T5EncoderModel(t5_config)
    _look_nearby(t5)
    return clip.eval(), t5.eval()


@torch.no_grad()
def _look_nearby(t5: T5EncoderModel) -> None:
    """Start three of T5's four heads on the tokens before, after and around each token.

    From a random start, many tokens that are mostly padding drown the neighbours, and which colour
    belongs to what is still a coin's toss after 19 000 captions.
    """
    # 0-7 are exact distances, 8-15 grow up to 128
    buckets = torch.arange(16, dtype=torch.float32, device="cpu")
    distance = torch.where(buckets < 8, buckets, 8 * 16 ** ((buckets - 8) / 8))
    near, off = -distance, torch.full_like(distance, -8.0)
    zero = torch.zeros_like(distance)
    before = torch.stack([zero, near, off, near / 2], dim=1)  # [16 buckets, 4 heads]
    after = torch.stack([zero, off, near, near / 2], dim=1)
    before[0, 1:3] = -2.0  # the token itself
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.copy_(torch.cat([before, after]))


def save_text(folder: str | Path, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
    """Write the encoders, in their dtype, to `text_encoder/` (CLIP) and `text_encoder_2/` (T5).

    The tensors have the names of FLUX.1's files whatever transformers calls the parameters.
    """
    for name, encoder in (("text_encoder", clip), ("text_encoder_2", t5)):
        with new_folder(Path(folder) / name, ALL) as path:
            save_encoder(encoder, path)


def load_text(folder: str | Path) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Load what `save_text` wrote, in fp32 and evaluation mode."""
    from transformers import CLIPTextModel, T5EncoderModel

    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    return (
        CLIPTextModel.from_pretrained(str(Path(folder) / "text_encoder"), **options).eval(),
        T5EncoderModel.from_pretrained(str(Path(folder) / "text_encoder_2"), **options).eval(),
    )


@torch.no_grad()
def start_from(
    folder: str | Path, clip: CLIPTextModel, t5: T5EncoderModel, tokenizers: Tokenizers
) -> None:
    """Gives encoders, in place, the weights of others; tokens that those lack keep their own.

    Raises:
        ValueError: the folder is not that of two text encoders, or a tensor has another shape.
    """
    start = TextEncoder.from_folder(folder)
    theirs = (start.clip, start.clip_tokenizer), (start.t5, start.t5_tokenizer)
    for ours, tokenizer, (old, old_tokenizer) in zip((clip, t5), tokenizers, theirs, strict=True):
        old_ids = old_tokenizer.get_vocab()
        pairs = [
            (i, old_ids[token]) for token, i in tokenizer.get_vocab().items() if token in old_ids
        ]
        new_rows, old_rows = torch.tensor(pairs, dtype=torch.int64, device="cpu").unbind(1)
        for mine, other in zip(ours.parameters(), old.parameters(), strict=True):
            words = mine.shape[0] == len(tokenizer)
            if mine.shape[words:] != other.shape[words:]:
                raise ValueError(
                    f"{folder}: a tensor must be {list(mine.shape)}, got {list(other.shape)}"
                )
            if words:
                mine[new_rows] = other[old_rows]
            else:
                mine.copy_(other)


# Pretraining


class _PooledHeads(nn.Module):
    """One linear classifier per attribute on a pooled vector [B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, vec: Tensor) -> dict[str, Tensor]:
        return {name: head(vec) for name, head in self.heads.items()}


class _AttentionHeads(nn.Module):
    """One learned query per attribute attends to the tokens [B, L, C]; a classifier follows."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ATTRIBUTES.items()})
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), WIDTH) * WIDTH**-0.5)

    def forward(self, txt: Tensor) -> dict[str, Tensor]:
        weights = (txt @ self.queries.T).softmax(dim=1)  # [B, L, attributes]
        pooled = weights.transpose(1, 2) @ txt  # [B, attributes, C]
        return {name: head(pooled[:, i]) for i, (name, head) in enumerate(self.heads.items())}


def pretrain_encoders(
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    tokenizers: Tokenizers,
    *,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Train both encoders, in place, to tell a scene's attributes from its caption.

    Each minimises the mean over ATTRIBUTES of the cross-entropy of a classifier that is thrown
    away: CLIP's reads the pooled vector, T5's attends to all 32 tokens, the padding too, as FLUX
    does. What a caption does not say is left out.

    Args:
        clip, t5, tokenizers: of `build_encoders` and `build_tokenizers`.
        steps: optimiser steps, with warm-up and cosine decay of the learning rate.
        batch_size: captions a step.
        learning_rate: the highest, of AdamW.
        seed: of the captions and the classifiers; the global random state is left as it was.
        progress: called with the number of finished steps and the last loss of both together.

    Returns:
        Accuracy on fresh captions (`clip_shape`, ..., `t5_position`), on held-out scenes
        (`clip_held_out_shape`, ...), the embeddings' `clip_std` and `t5_std`, and the last `loss`.

    Raises:
        ValueError: if steps or batch_size is below 1.
        Diverged: a loss or a weight is not finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_heads, t5_heads = _PooledHeads(), _AttentionHeads()
    clip_heads, t5_heads = clip_heads.to(clip.device), t5_heads.to(t5.device)
    groups = [[*clip.parameters(), *clip_heads.parameters()]]
    groups += [[*t5.parameters(), *t5_heads.parameters()]]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups], lr=learning_rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _warm_up_decay(i, steps))
    rng = np.random.default_rng([seed, 0])
    clip.train(), t5.train()
    for step in range(1, steps + 1):
        captions, labels = _batch(rng, batch_size)
        clip_logits, t5_logits = _logits(clip, t5, clip_heads, t5_heads, tokenizers, captions)
        loss = _loss(clip_logits, labels) + _loss(t5_logits, labels)
        optimizer.zero_grad()
        loss.backward()
        check_finite(f"text stopped in step {step}", "loss", loss.item())
        for group in groups:  # the two encoders share nothing
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        schedule.step()
        for group in groups:
            check_finite(f"text stopped in step {step}", "norm of the weights", group)
        if progress is not None:
            progress(step, loss.item())
    clip.eval(), t5.eval()
    metrics = {"loss": loss.item()}
    for prefix, held_out in (("", False), ("held_out_", True)):
        metrics |= _evaluate(clip, t5, clip_heads, t5_heads, tokenizers, seed, prefix, held_out)
    return metrics


def encode(
    clip: CLIPTextModel, t5: T5EncoderModel, tokenizers: Tokenizers, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Encode captions as FLUX does, at the compact model's text length.

    CLIP is causal, so its padding is only as long as the batch needs: the vector is the same.

    Returns:
        txt [B, 32, 128] and vec [B, 128].
    """
    clip_ids = tokenizers.clip(
        captions, padding=True, truncation=True, max_length=CLIP_LENGTH, return_tensors="pt"
    ).input_ids
    t5_ids = tokenizers.t5(
        captions, padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt"
    ).input_ids
    vec = clip(input_ids=clip_ids.to(clip.device)).pooler_output
    txt = t5(input_ids=t5_ids.to(t5.device)).last_hidden_state
    return txt, vec


def _logits(clip, t5, clip_heads, t5_heads, tokenizers, captions):
    txt, vec = encode(clip, t5, tokenizers, captions)
    return clip_heads(vec), t5_heads(txt)


def _batch(
    rng: np.random.Generator,
    size: int,
    held_out: bool = False,
    incomplete: float = INCOMPLETE_SHARE,
) -> tuple[list[str], dict[str, Tensor]]:
    """Captions and, per attribute, their labels [size]."""
    scenes = [random_scene(rng, held_out=held_out) for _ in range(size)]
    captions = [caption(scene, rng, complete=rng.random() >= incomplete) for scene in scenes]
    rows = [_labels(scene, text) for scene, text in zip(scenes, captions, strict=True)]
    labels = torch.tensor(rows, dtype=torch.int64, device="cpu").unbind(1)
    return captions, dict(zip(ATTRIBUTES, labels, strict=True))


def _labels(scene: Scene, text: str) -> list[int]:
    """The index of each attribute; what the caption leaves out is UNSAID."""
    words = re.findall(r"[a-z]+", text.lower())
    shape, colour = scene.other or (None, None)
    shown = vars(scene) | {"other shape": shape, "other colour": colour}
    shown["relation"] = scene.relation or "none"
    labels = []
    for name, values in ATTRIBUTES.items():
        value = shown[name]
        said = value in words if name in ("colour", "background") else value is not None
        labels.append(values.index(value) if said else UNSAID)
    return labels


def _loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    losses = []
    for name in ATTRIBUTES:
        target = labels[name].to(logits[name].device)
        count = (target != UNSAID).sum().clamp(min=1)
        losses.append(F.cross_entropy(logits[name], target, reduction="sum") / count)
    return torch.stack(losses).mean()


def _warm_up_decay(step: int, steps: int) -> float:
    warm_up = max(1, min(40, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def _evaluate(clip, t5, clip_heads, t5_heads, tokenizers, seed, prefix, held_out, count=512):
    """Accuracies on complete captions never trained on, and the spread of the embeddings."""
    rng = np.random.default_rng([seed, 1 + held_out])
    captions, labels = _batch(rng, count, held_out=held_out, incomplete=0.0)
    txt, vec = encode(clip, t5, tokenizers, captions)
    metrics = {} if held_out else {"clip_std": vec.std().item(), "t5_std": txt.std().item()}
    for encoder, logits in (("clip", clip_heads(vec)), ("t5", t5_heads(txt))):
        for name in ATTRIBUTES:
            said = labels[name] != UNSAID
            right = logits[name].argmax(-1).cpu() == labels[name]
            metrics[f"{encoder}_{prefix}{name}"] = right[said].float().mean().item()
    return metrics
