"""The two text encoders of FLUX.1: CLIP gives one vector a prompt, T5 a sequence of them."""

from __future__ import annotations

import copy
import textwrap
import warnings
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._files import read_json, read_weight_map

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

T5_LIMIT = 512
CLIP_TYPE, T5_TYPE = "clip_text_model", "t5"  # model_type in a config.json
_CODE_CHOOSING_KEYS = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "quantization_config",
    "attn_implementation",
    "experts_implementation",
    "kernel_config",
    "use_kernels",
)
_FILE_CHOOSING_KEYS = (
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "fast_tokenizer_files",
    "transformers_weights",
)


class TextEncoder:
    """CLIP and T5 with their tokenizers.

    Args:
        clip: transformers' CLIPTextModel.
        clip_tokenizer: its tokenizer; `model_max_length` (77) is the length it is given.
        t5: transformers' T5EncoderModel.
        t5_tokenizer: its tokenizer; `model_max_length` is the length the checkpoint was trained at.
    """

    def __init__(
        self,
        clip: CLIPTextModel,
        clip_tokenizer: CLIPTokenizer,
        t5: T5EncoderModel,
        t5_tokenizer: T5TokenizerFast,
    ) -> None:
        self.clip = clip.eval()
        self.clip_tokenizer = clip_tokenizer
        self.t5 = t5.eval()
        self.t5_tokenizer = t5_tokenizer

    @property
    def device(self) -> torch.device:
        return self.t5.device

    @property
    def max_sequence_length(self) -> int:
        """T5 length the checkpoint was made for, at most 512."""
        return min(self.t5_tokenizer.model_max_length, T5_LIMIT)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextEncoder:
        """Move both encoders.

        Args:
            device: where to; None leaves them.
            dtype: floating dtype to cast to; None leaves it.

        Returns:
            This text encoder.
        """
        for encoder in (self.clip, self.t5):
            encoder.to(device=device, dtype=dtype)
        return self

    def encode(
        self,
        prompt: list[str],
        prompt_2: list[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts; what an encoder has no room for is cut with a warning that shows it.

        Args:
            prompt: B prompts, for CLIP.
            prompt_2: B prompts for T5; None gives it `prompt`.
            max_sequence_length: tokens T5 pads or cuts to, 1 to 512; None is the checkpoint's own.

        Returns:
            txt [B, max_sequence_length, context], T5's last hidden state with padding encoded too;
            vec [B, vec], CLIP's pooled output. Both in their encoder's dtype.

        Raises:
            ValueError: a prompt that is not valid text, lists of different length or a
                `max_sequence_length` out of bounds.

        Source: diffusers `FluxPipeline.encode_prompt`.
        """
        prompt_2 = prompt if prompt_2 is None else prompt_2
        length = self.max_sequence_length if max_sequence_length is None else max_sequence_length
        check_texts("prompt", prompt)
        check_texts("prompt_2", prompt_2)
        if len(prompt_2) != len(prompt):
            raise ValueError(f"prompt_2: {len(prompt_2)} texts for {len(prompt)} of prompt")
        if not 1 <= length <= T5_LIMIT:
            raise ValueError(f"max_sequence_length must be from 1 to {T5_LIMIT}, got {length}")
        clip_ids = _tokenize(
            self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length, "CLIP"
        )
        t5_ids = _tokenize(self.t5_tokenizer, prompt_2, length, "T5")
        vec = self.clip(clip_ids.to(self.clip.device)).pooler_output
        txt = self.t5(t5_ids.to(self.t5.device)).last_hidden_state
        return txt, vec

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        clip: CLIPTextModel | None = None,
        t5: T5EncoderModel | None = None,
    ) -> TextEncoder:
        """Load the text encoders of a diffusers folder, without network and without its code.

        Args:
            folder: holds `tokenizer`, `tokenizer_2`, `text_encoder` and `text_encoder_2`.
            dtype: floating dtype of the weights.
            device: where the encoders go.
            clip: a CLIP in the place of the folder's.
            t5: a T5 in the place of the folder's.

        Returns:
            The text encoder.

        Raises:
            ValueError: a part is absent, is another kind of model, has missing, unexpected or
                mis-shaped tensors, or asks for code or files of its own.
        """
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        folder = Path(folder)
        clip_tokenizer = _load_tokenizer(CLIPTokenizer, folder / "tokenizer")
        t5_tokenizer = _load_tokenizer(T5TokenizerFast, folder / "tokenizer_2")
        if clip is None:
            clip = _load_model(CLIPTextModel, CLIP_TYPE, folder / "text_encoder", dtype)
        if t5 is None:
            t5 = _load_model(T5EncoderModel, T5_TYPE, folder / "text_encoder_2", dtype)
        return cls(clip, clip_tokenizer, t5, t5_tokenizer).to(device)

    def save(self, folder: str | Path) -> None:
        """Write the four parts as subfolders of a diffusers folder.

        Args:
            folder: holds the parts afterwards.
        """
        folder = Path(folder)
        self.clip_tokenizer.save_pretrained(folder / "tokenizer")
        self.t5_tokenizer.save_pretrained(folder / "tokenizer_2")
        save_encoder(self.clip, folder / "text_encoder")
        save_encoder(self.t5, folder / "text_encoder_2")


def empty_encoder(part: str, folder: Path) -> CLIPTextModel | T5EncoderModel:
    """An encoder without its weights: all of it lies on the meta device.

    Args:
        part: "text_encoder" for CLIP, "text_encoder_2" for T5.
        folder: whose config.json has its sizes.

    Raises:
        ValueError: no such config, one of another kind of model, or one that asks for code.
    """
    from transformers import CLIPTextModel, T5EncoderModel

    is_clip = part == "text_encoder"
    kind, model_type = (CLIPTextModel, CLIP_TYPE) if is_clip else (T5EncoderModel, T5_TYPE)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)  # who reads the weights sees what they are
    _check_config(folder / "config.json", config, model_type)
    with torch.device("meta"):
        return _with_short_errors(folder, lambda: kind(kind.config_class.from_dict(config)))


def save_encoder(encoder: Any, folder: Path) -> None:
    """Write one encoder in its dtype, under FLUX.1's tensor names.

    transformers' own `save_pretrained` names CLIP's tensors by what the encoder was loaded from.

    Args:
        encoder: a CLIPTextModel or a T5EncoderModel.
        folder: made where it is not there.
    """
    from safetensors.torch import save_file

    prefix = "text_model." if encoder.config.model_type == "clip_text_model" else ""
    config = copy.deepcopy(encoder.config)
    config.architectures = [type(encoder).__name__]
    config.dtype = str(encoder.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    tensors = {
        prefix + name.removeprefix(prefix): parameter.detach().cpu().contiguous()
        for name, parameter in encoder.named_parameters()  # T5's tied embedding once: shared.weight
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_texts(name: str, texts: object) -> None:
    """Refuse what a tokenizer cannot read.

    Args:
        name: the argument, for the message.
        texts: should be a list of str.

    Raises:
        ValueError: not a list, an empty list, an item that is not str or holds lone surrogates.
    """
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{name} must be a list of at least one text, got {texts!r:.80}")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: not valid Unicode: {ascii(text)[:80]}") from None


_TOKENIZING = Lock()  # a call sets padding and truncation on the tokenizer, for all threads


def _tokenize(tokenizer: Any, texts: list[str], limit: int, name: str) -> Tensor:
    with _TOKENIZING:
        whole = tokenizer(texts, verbose=False).input_ids
        padded = tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
    for ids in whole:
        if len(ids) > limit:
            # the last token kept is the end mark, so the cut begins one earlier
            cut = textwrap.shorten(tokenizer.decode(ids[limit - 1 : -1]), 400, placeholder=" ...")
            warnings.warn(
                f"{name} reads {limit} tokens and the prompt has {len(ids)}; this was cut: {cut!r}",
                stacklevel=4,
            )
    return padded.input_ids  # [B, limit]


def _load_tokenizer(kind: type, folder: Path) -> Any:
    path = folder / "tokenizer_config.json"
    _check_config(path, read_json(path))
    return _with_short_errors(folder, kind.from_pretrained, folder, local_files_only=True)


def _load_model(kind: type, model_type: str, folder: Path, dtype: torch.dtype) -> Any:
    _check_config(folder / "config.json", read_json(folder / "config.json"), model_type)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter, which fluxkern does not load")
    for index in sorted(folder.glob("*.index.json")):
        read_weight_map(index)  # transformers would follow any path in it
    model, report = _with_short_errors(
        folder,
        kind.from_pretrained,
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report below names them
    )
    for fault in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, report[f"{fault}_keys"]))
        if names:
            raise ValueError(f"{folder}: {len(names)} {fault} tensors: {', '.join(names[:8])}")
    return model.requires_grad_(False)


def _with_short_errors(folder: Path, load: Any, *args: Any, **options: Any) -> Any:
    """Turn whatever transformers and safetensors raise for a bad folder into one line."""
    try:
        return load(*args, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: cannot be loaded: {type(error).__name__}: {reason[:300]}"
        ) from error


def _check_config(path: Path, config: dict[str, Any], model_type: str | None = None) -> None:
    _refuse_code(path, config)
    for key in _FILE_CHOOSING_KEYS:
        if config.get(key) is not None:
            raise ValueError(f"{path}: may not choose a file ({key})")
    found = config.get("model_type")
    if model_type is not None and found != model_type:
        raise ValueError(
            f"{path.parent}: model_type must be {model_type!r}, got {str(found)[:80]!r}"
        )


def _refuse_code(path: Path, value: object) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            bare = key.lstrip("_").removesuffix("_internal")
            if bare in _CODE_CHOOSING_KEYS and inner:
                raise ValueError(f"{path}: {key} chooses code, which fluxkern does not allow")
            _refuse_code(path, inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(path, inner)
