"""The two text encoders of FLUX.1: CLIP gives one vector a prompt, T5 a sequence of them."""

from __future__ import annotations

import base64
import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._files import check_file, read_json, read_tensor_header, read_weight_map, write_tensors

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

T5_LIMIT = 512
CLIP_TYPE, T5_TYPE = "clip_text_model", "t5"  # model_type in a config.json
TEXT_LIMIT = 2**20  # characters of a prompt
TOKENIZER_LIMIT = 2**24  # bytes of a file; those of FLUX.1 have up to 4 million
MAX_SIZE, MAX_LAYERS = 2**20, 256
FLOATS = ("F64", "F32", "F16", "BF16")
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


_SIZE, _LAYERS, _SHARE = (int, 1, MAX_SIZE), (int, 1, MAX_LAYERS), (float, 0, 1)
_ID = (int, 0, MAX_SIZE)
_CLIP_FIELDS = {  # of config.json: type, least and most; what else stands there is not read
    "attention_dropout": _SHARE,
    "bos_token_id": _ID,
    "eos_token_id": _ID,
    "hidden_act": (str, 1, 32),
    "hidden_size": _SIZE,
    "initializer_factor": (float, 0, MAX_SIZE),
    "initializer_range": (float, 0, MAX_SIZE),
    "intermediate_size": _SIZE,
    "layer_norm_eps": _SHARE,
    "max_position_embeddings": _SIZE,
    "num_attention_heads": _SIZE,
    "num_hidden_layers": _LAYERS,
    "pad_token_id": _ID,
    "projection_dim": _SIZE,
    "vocab_size": _SIZE,
}
_T5_FIELDS = {
    "classifier_dropout": _SHARE,
    "d_ff": _SIZE,
    "d_kv": _SIZE,
    "d_model": _SIZE,
    "dropout_rate": _SHARE,
    "eos_token_id": _ID,
    "feed_forward_proj": (str, 1, 32),
    "initializer_factor": (float, 0, MAX_SIZE),
    "layer_norm_epsilon": _SHARE,
    "num_decoder_layers": (int, 0, MAX_LAYERS),
    "num_heads": _SIZE,
    "num_layers": _LAYERS,
    "pad_token_id": _ID,
    "relative_attention_max_distance": _SIZE,
    "relative_attention_num_buckets": (int, 4, 4096),
    "tie_word_embeddings": (bool, 0, 1),
    "vocab_size": _SIZE,
}
_DERIVED = ("dense_act_fn", "is_gated_act")  # from T5's feed_forward_proj
_ALSO_STORED = {"embeddings.position_ids", "encoder.embed_tokens.weight"}  # by older writers


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

    @property
    def _clip_length(self) -> int:
        return min(self.clip_tokenizer.model_max_length, self.clip.config.max_position_embeddings)

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
            ValueError: a prompt that is not valid text or too long, lists of different length, a
                `max_sequence_length` out of bounds, or a tokenizer that does not fit its encoder.

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
        clip_ids = _tokenize(self.clip_tokenizer, prompt, self._clip_length, "CLIP", self.clip)
        t5_ids = _tokenize(self.t5_tokenizer, prompt_2, length, "T5", self.t5)
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
            ValueError: a part is absent, is another kind of model, has numbers out of bounds,
                missing, unexpected or mis-shaped tensors, or a tokenizer that does not fit the
                encoder, or asks for code or files of its own. No memory is taken for it then.
        """
        from transformers import CLIPTokenizer, T5TokenizerFast

        folder = Path(folder)
        if clip is None:
            clip = _compared("text_encoder", folder / "text_encoder")
        if t5 is None:
            t5 = _compared("text_encoder_2", folder / "text_encoder_2")
        tokenizers = (
            _load_tokenizer(CLIPTokenizer, folder / "tokenizer", clip.config, "BPE"),
            _load_tokenizer(T5TokenizerFast, folder / "tokenizer_2", t5.config, "Unigram"),
        )
        if clip.device.type == "meta":
            clip = _filled(clip, folder / "text_encoder", dtype)
        if t5.device.type == "meta":
            t5 = _filled(t5, folder / "text_encoder_2", dtype)
        return cls(clip, tokenizers[0], t5, tokenizers[1]).to(device)

    def save(self, folder: str | Path) -> None:
        """Write the four parts as subfolders of a diffusers folder.

        Args:
            folder: holds the parts afterwards.
        """
        folder = Path(folder)
        _save_tokenizer(self.clip_tokenizer, folder / "tokenizer")
        _save_tokenizer(self.t5_tokenizer, folder / "tokenizer_2")
        save_encoder(self.clip, folder / "text_encoder")
        save_encoder(self.t5, folder / "text_encoder_2")


def empty_encoder(part: str, folder: Path) -> CLIPTextModel | T5EncoderModel:
    """An encoder without its weights: all of it lies on the meta device.

    Args:
        part: "text_encoder" for CLIP, "text_encoder_2" for T5.
        folder: whose config.json has its sizes.

    Raises:
        ValueError: no such config, one of another kind of model, with numbers out of bounds, or
            that asks for code.
    """
    data = read_json(folder / "config.json")
    data.pop("quantization_config", None)  # who reads the weights sees what they are
    return _empty(part, folder, data)


def save_encoder(encoder: Any, folder: Path) -> None:
    """Write one encoder in its dtype, under FLUX.1's tensor names.

    transformers' own `save_pretrained` names CLIP's tensors by what the encoder was loaded from.

    Args:
        encoder: a CLIPTextModel or a T5EncoderModel.
        folder: made where it is not there.
    """
    prefix = "text_model." if encoder.config.model_type == "clip_text_model" else ""
    config = copy.deepcopy(encoder.config)
    config.architectures = [type(encoder).__name__]
    config.dtype = str(encoder.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    tensors = {
        prefix + name.removeprefix(prefix): parameter.detach().cpu().contiguous()
        for name, parameter in encoder.named_parameters()  # T5's tied embedding once: shared.weight
    }
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def check_texts(name: str, texts: object) -> None:
    """Refuse what a tokenizer cannot read.

    Args:
        name: the argument, for the message.
        texts: should be a list of str.

    Raises:
        ValueError: not a list, an empty list, an item that is not str, has more than 2**20
            characters, or holds lone surrogates.
    """
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{name} must be a list of at least one text, got {texts!r:.80}")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {type(text).__name__}")
        if len(text) > TEXT_LIMIT:
            raise ValueError(f"{name} must have at most {TEXT_LIMIT} characters, got {len(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: not valid Unicode: {ascii(text)[:80]}") from None


_TOKENIZING = Lock()  # a call sets padding and truncation on the tokenizer, for all threads


def _tokenize(tokenizer: Any, texts: list[str], limit: int, name: str, encoder: Any) -> Tensor:
    with _TOKENIZING, _short_errors(f"{name}'s tokenizer fails"):
        whole = tokenizer(texts, verbose=False).input_ids
        padded = tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
    rows = encoder.get_input_embeddings().num_embeddings
    if padded.max() >= rows:
        raise ValueError(
            f"{name}'s tokenizer gives the token {padded.max()}, its encoder has {rows}"
        )
    for ids in whole:
        if len(ids) > limit:
            # the last token kept is the end mark, so the cut begins one earlier
            lost = tokenizer.decode(ids[limit - 1 : -1][:500])
            cut = " ".join(lost[:2000].split())
            cut = cut if len(cut) <= 400 else f"{cut[:396].rstrip()} ..."
            warnings.warn(
                f"{name} reads {limit} tokens and the prompt has {len(ids)}; this was cut: {cut!r}",
                stacklevel=4,
            )
    return padded  # [B, limit]


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as it was loaded: the last call's padding is no part of it."""
    backend = tokenizer.backend_tokenizer
    with _TOKENIZING:
        backend.no_truncation()
        backend.no_padding()
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the library's own for a full disk
            raise OSError(f"{folder} cannot be written: {error}") from None


# loading


def _load_tokenizer(kind: type, folder: Path, config: Any, model: str) -> Any:
    data = read_json(folder / "tokenizer_config.json")
    _check_config(folder / "tokenizer_config.json", data)
    most = getattr(config, "max_position_embeddings", None)
    _check_number(folder, data, "model_max_length", (int, 3 if most else 1, most or 10**40))
    _check_number(folder, {"extra_ids": 0} | data, "extra_ids", (int, 0, 1000))
    _check_tokenizer_files(folder, model)
    with _short_errors(f"{folder}: cannot be loaded"):
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        ids, top = tokenizer("a").input_ids, max(tokenizer.get_vocab().values())
        names = ("bos", "eos", "pad", "unk")
        marks = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    _check_tokenizer(folder, config, top, marks, ids)
    return tokenizer


def _check_tokenizer_files(folder: Path, model: str) -> None:
    for path in folder.iterdir():
        check_file(path)
        if path.stat().st_size > TOKENIZER_LIMIT:
            raise ValueError(f"{path}: larger than {TOKENIZER_LIMIT} bytes")
    names = ("vocab.json", "merges.txt")
    if (folder / "tokenizer.json").exists():
        _check_tokenizer_json(folder / "tokenizer.json", model)
    elif model != "BPE" or not all((folder / name).exists() for name in names):
        other = f", nor {' and '.join(names)}" if model == "BPE" else ""
        raise ValueError(f"{folder}: has no tokenizer.json{other}")


def _check_tokenizer_json(path: Path, kind: str) -> None:
    """Refuse what transformers would read as an empty vocabulary, and maps that do not end."""
    data = read_json(path, TOKENIZER_LIMIT)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", kind) != kind:
        raise ValueError(f"{path}: model must be {kind}")
    wanted = {"vocab": dict, "merges": list} if kind == "BPE" else {"vocab": list}
    for name, container in wanted.items():
        if not isinstance(model.get(name), container) or not model[name]:
            raise ValueError(f"{path}: the model has no {name}")
    if kind == "Unigram" and not all(_is_piece(piece) for piece in model["vocab"]):
        raise ValueError(f"{path}: the vocab must be pairs of a text and a finite number")
    normalizer = data.get("normalizer")
    inner = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    for part in (normalizer, *(inner if isinstance(inner, list) else [])):
        if isinstance(part, dict) and "precompiled_charsmap" in part:
            _check_map(path, part["precompiled_charsmap"])


def _is_piece(piece: object) -> bool:
    return (
        isinstance(piece, list)
        and len(piece) == 2
        and isinstance(piece[0], str)
        and type(piece[1]) in (int, float)
        and abs(piece[1]) < 1e6
    )


def _check_map(path: Path, text: object) -> None:
    """SentencePiece's map of characters: bytes of a trie, the trie, texts that end in 0."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        data = b""
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size :]
    if size < 4 or size % 4 or texts[-1:] != b"\0" or max(map(len, texts.split(b"\0"))) > 255:
        raise ValueError(f"{path}: the precompiled_charsmap is damaged")


def _check_tokenizer(
    folder: Path, config: Any, top: int, marks: dict[str, int | None], ids: list[int]
) -> None:
    """Refuse a tokenizer whose tokens mean something else to its encoder, or nothing.

    `top` is its highest token, `ids` what it makes of "a".
    """
    clip, rows = config.model_type == CLIP_TYPE, config.vocab_size
    if max(top, *ids) >= rows:
        raise ValueError(f"{folder}: has tokens up to {max(top, *ids)}, its encoder has {rows}")
    around = [marks["bos"], marks["eos"]] if clip else [marks["eos"]]
    if [*ids[:clip], ids[-1]] != around or len(ids) <= len(around):
        raise ValueError(f"{folder}: must put {around} around a text, got {ids} for 'a'")
    if marks["unk"] in (None, *ids[clip:-1]) or marks["pad"] is None:
        raise ValueError(f"{folder}: knows no letters, or no padding or unknown token")
    old = clip and config.eos_token_id == 2  # then the highest token is the end, as CLIP has it
    wanted = {"eos": top if old else config.eos_token_id}
    if not old:
        name = "bos" if clip else "pad"
        wanted[name] = getattr(config, f"{name}_token_id")
    for name, token in wanted.items():
        if marks[name] != token:
            raise ValueError(
                f"{folder}: its {name}_token is {marks[name]}, that of its encoder {token}"
            )


def _compared(part: str, folder: Path) -> Any:
    """A model without memory, all of whose tensors are in the folder's files, in their shapes."""
    model = _empty(part, folder, read_json(folder / "config.json"))
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter, which fluxkern does not load")
    _compare(folder, model, _stored(folder))
    return model


def _empty(part: str, folder: Path, data: dict[str, Any]) -> Any:
    from transformers import CLIPTextModel, T5EncoderModel

    kind, model_type, fields = (
        (CLIPTextModel, CLIP_TYPE, _CLIP_FIELDS)
        if part == "text_encoder"
        else (T5EncoderModel, T5_TYPE, _T5_FIELDS)
    )
    _check_config(folder / "config.json", data, model_type)
    known = {name: data[name] for name in fields if data.get(name) is not None}
    for name in known:
        _check_number(folder, known, name, fields[name])
    with _short_errors(f"{folder}: cannot be loaded"):
        config = kind.config_class(**known)
    for name in _DERIVED:
        if data.get(name, getattr(config, name, None)) != getattr(config, name, None):
            raise ValueError(
                f"{folder}: {name} must be {getattr(config, name, None)!r}, got {data[name]!r:.80}"
            )
    if model_type == T5_TYPE:
        _check_buckets(folder, config)
    elif config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{folder}: num_attention_heads must divide hidden_size {config.hidden_size}, "
            f"got {config.num_attention_heads}"
        )
    with _short_errors(f"{folder}: cannot be loaded"), torch.device("meta"):
        return kind(config)


def _check_buckets(folder: Path, config: Any) -> None:
    """Half of the buckets of either direction are exact distances, the others lie beyond."""
    exact, most = config.relative_attention_num_buckets // 4, config.relative_attention_max_distance
    if most <= exact:
        raise ValueError(
            f"{folder}: relative_attention_max_distance must be above {exact}, got {most}"
        )


def _check_number(folder: Path, data: dict[str, Any], name: str, bounds: tuple) -> None:
    kind, least, most = bounds
    value = data.get(name)
    good = type(value) is kind or kind is float and type(value) is int
    if not good or not least <= (len(value) if kind is str else value) <= most:
        what = "a text of" if kind is str else f"{kind.__name__} from"
        raise ValueError(f"{folder}: {name} must be {what} {least} to {most}, got {value!r:.80}")


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
    """What the files that transformers will read hold: name -> shape and dtype, of the header."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        check_file(single)
        return read_tensor_header(single)[0]
    places, found = read_weight_map(index), {}
    for shard in sorted(set(places.values())):
        check_file(folder / shard)
        held, *_ = read_tensor_header(folder / shard)
        if {name for name, file in places.items() if file == shard} != held.keys():
            raise ValueError(f"{folder / shard}: holds other tensors than the index says")
        found |= held
    return found


def _compare(folder: Path, model: Any, stored: dict[str, dict[str, Any]]) -> None:
    shapes = {_bare(name): list(p.shape) for name, p in model.named_parameters()}
    found = {_bare(name): about for name, about in stored.items()}
    found = {name: about for name, about in found.items() if name not in _ALSO_STORED}
    faults = {
        "missing": shapes.keys() - found.keys(),
        "unexpected": found.keys() - shapes.keys(),
        "mismatched": {n for n in shapes.keys() & found.keys() if found[n]["shape"] != shapes[n]},
        "quantised": {n for n in found if found[n]["dtype"] not in FLOATS},
    }
    for fault, names in faults.items():
        if names:
            listed = ", ".join(f"{name:.200}" for name in sorted(names)[:8])
            raise ValueError(f"{folder}: {len(names)} {fault} tensors: {listed}")


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _filled(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    with _short_errors(f"{folder}: cannot be loaded"):
        model, report = type(model).from_pretrained(
            folder,
            config=model.config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"without {sorted(report['missing_keys'])[:8]}")
    return model.requires_grad_(False)


@contextmanager
def _short_errors(what: str) -> Iterator[None]:
    """Turn whatever transformers, safetensors and tokenizers raise into one line."""
    try:
        yield
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error)[:1000].split())
        raise ValueError(f"{what}: {type(error).__name__}: {reason[:300]}") from error


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
