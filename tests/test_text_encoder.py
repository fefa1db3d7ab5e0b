"""Text encoding against diffusers, what is cut is said aloud, and folders that ask for too much."""

import base64
import json
import os
import random
import re
import shutil
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FluxPipeline
from tiny_flux import tiny_text

from fluxkern.compact.text import T5_LENGTH
from fluxkern.model import text_encoder
from fluxkern.model.text_encoder import TextEncoder

PROMPTS = ["a red circle on a blue background", "", "ein Öl-Bild: 圆, 🟢 и круг", "STAR!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    clip, _, t5, _ = tiny_text(folder)
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.from_folder(folder)


@pytest.fixture(scope="module")
def diffusers_encoder(encoder):
    parts = dict.fromkeys(("scheduler", "vae", "transformer"))  # not needed to encode
    return FluxPipeline(
        text_encoder=encoder.clip,
        tokenizer=encoder.clip_tokenizer,
        text_encoder_2=encoder.t5,
        tokenizer_2=encoder.t5_tokenizer,
        **parts,
    )


@pytest.fixture
def broken(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    return tmp_path / "broken"


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 64, 512])
def test_embeddings_equal_those_of_diffusers(encoder, diffusers_encoder, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if length == 1 else "error")
        txt, vec = encoder.encode(PROMPTS, None, length)
    expected_txt, expected_vec, _ = diffusers_encoder.encode_prompt(
        PROMPTS, None, max_sequence_length=length
    )
    assert txt.shape == (4, length, 32)
    assert vec.shape == (4, 24)
    assert torch.equal(txt, expected_txt)
    assert torch.equal(vec, expected_vec)


@torch.no_grad()
def test_prompt_2_is_what_t5_reads(encoder):
    txt, vec = encoder.encode(["a star"], ["a ring"])
    assert torch.equal(txt, encoder.encode(["a ring"])[0])
    assert torch.equal(vec, encoder.encode(["a star"])[1])
    assert not torch.equal(txt, encoder.encode(["a star"])[0])


@torch.no_grad()
def test_a_batch_equals_its_singles(encoder):
    txt, vec = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        one_txt, one_vec = encoder.encode([prompt])
        torch.testing.assert_close(txt[i : i + 1], one_txt)
        torch.testing.assert_close(vec[i : i + 1], one_vec)


def test_threads_that_share_an_encoder_do_not_disturb_each_other(encoder):
    texts = [["a red ring", "a small blue star on the left"][: 1 + i % 2] for i in range(200)]
    with ThreadPoolExecutor(4) as threads:
        for found, prompts in zip(threads.map(encoder.encode, texts), texts, strict=True):
            assert found[0].equal(encoder.encode(prompts)[0])


def test_default_length_is_that_of_the_checkpoint(encoder):
    assert encoder.max_sequence_length == T5_LENGTH
    assert encoder.encode(["a star"])[0].shape[1] == T5_LENGTH


@torch.no_grad()
def test_each_encoder_says_what_it_cuts(encoder, diffusers_encoder):
    prompt = "a red star " * 200 + "and a ring"  # 602 words, 2 marks for CLIP, 1 for T5
    with pytest.warns(UserWarning) as said:
        txt, vec = encoder.encode([prompt], None, 512)
    clip, t5 = (str(warning.message) for warning in said)
    assert clip.startswith("CLIP reads 77 tokens and the prompt has 605; this was cut: 'a red star")
    assert t5.startswith("T5 reads 512 tokens and the prompt has 604; this was cut: ")
    assert t5.endswith("and a ring'")
    assert "\n" not in clip + t5
    expected_txt, expected_vec, _ = diffusers_encoder.encode_prompt(prompt, None)
    assert torch.equal(txt, expected_txt)
    assert torch.equal(vec, expected_vec)


def test_what_is_cut_is_the_text_behind_the_last_token_kept(encoder):
    words = ["red"] * (T5_LENGTH - 1) + ["circle", "cross"]
    said = f"T5 reads {T5_LENGTH} tokens.* has {T5_LENGTH + 2}; this was cut: 'circle cross'"
    with pytest.warns(UserWarning, match=said):
        encoder.encode([" ".join(words)])


def test_what_is_cut_is_shown_where_it_has_no_spaces(encoder):
    with pytest.warns(UserWarning) as said:
        encoder.encode(["red" * 900])
    clip, t5 = (str(warning.message) for warning in said)
    for message in (clip, t5):
        shown = message.partition("this was cut: ")[2]
        assert 300 < len(shown) <= 402 and shown.endswith(" ...'"), message


def test_a_prompt_that_just_fits_is_not_warned_about(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([" ".join(["red"] * 75)], [" ".join(["red"] * (T5_LENGTH - 1))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a star",), "prompt must be a list of at least one text, got 'a star'"),
        (([],), r"prompt must be a list of at least one text, got \[\]"),
        (([3],), "prompt must be text, got int"),
        ((["a \ud800"],), "prompt: not valid Unicode"),
        ((["a"], ["b", "c"]), "prompt_2: 2 texts for 1 of prompt"),
        ((["a"], None, 513), "max_sequence_length must be from 1 to 512, got 513"),
        ((["a"], None, 0), "max_sequence_length must be from 1 to 512, got 0"),
    ],
)
def test_bad_prompts_are_refused(encoder, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        encoder.encode(*arguments)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_saving_and_loading_changes_nothing(encoder, tmp_path):
    encoder.save(tmp_path)
    again = TextEncoder.from_folder(tmp_path)
    for ours, theirs in zip(again.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        assert torch.equal(ours, theirs)


def test_loading_in_another_dtype_gives_embeddings_in_it(folder):
    encoder = TextEncoder.from_folder(folder, dtype=torch.bfloat16)
    assert {x.dtype for x in encoder.encode(["a star"])} == {torch.bfloat16}
    assert not any(p.requires_grad for p in [*encoder.clip.parameters(), *encoder.t5.parameters()])


def change_config(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize("part", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"_attn_implementation": "someone/kernel"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"nested": [{"trust_remote_code": True}]},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_a_config_that_chooses_code_is_refused(broken, part, change):
    change_config(broken / part, **change)
    with pytest.raises(ValueError, match="chooses code, which fluxkern does not allow"):
        TextEncoder.from_folder(broken)


def test_a_tokenizer_that_chooses_its_file_is_refused(broken):
    change_config(broken / "tokenizer_2" / "tokenizer_config.json", tokenizer_file="/etc/passwd")
    with pytest.raises(ValueError, match=r"may not choose a file \(tokenizer_file\)"):
        TextEncoder.from_folder(broken)


def test_another_model_type_is_refused(broken):
    change_config(broken / "text_encoder" / "config.json", model_type="llama")
    with pytest.raises(ValueError, match="model_type must be 'clip_text_model', got 'llama'"):
        TextEncoder.from_folder(broken)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"])
def test_an_absent_part_is_named(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(ValueError, match=rf"broken/{part}: has no \w*config.json"):
        TextEncoder.from_folder(broken)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[1]", "not a JSON object"), (" " * (1 << 21), "larger than 1048576")],
)
def test_a_config_that_is_none_is_refused(broken, name, content, message):
    (broken / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_folder(broken)


def test_weights_that_are_missing_or_of_another_shape_are_named(broken):
    from safetensors.torch import load_file, save_file

    path = broken / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    save_file({key: x for key, x in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder: 1 missing tensors: .*layer_norm.bias"):
        TextEncoder.from_folder(broken)
    save_file(weights | {name: torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder: 1 mismatched tensors: .*layer_norm.bias"):
        TextEncoder.from_folder(broken)
    save_file(weights | {"surprise": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder: 1 unexpected tensors: surprise"):
        TextEncoder.from_folder(broken)


def test_truncated_weights_are_one_line(broken):
    path = broken / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="text_encoder_2/model.safetensors is damaged") as caught:
        TextEncoder.from_folder(broken)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(broken):
    weights = broken / "text_encoder" / "model.safetensors"
    weights.unlink()
    torch.save({"x": torch.zeros(1)}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="text_encoder: has no model.safetensors"):
        TextEncoder.from_folder(broken)


def test_an_index_that_points_outside_is_refused(broken):
    weights = broken / "text_encoder" / "model.safetensors"
    weights.rename(broken / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "../model-00001-of-00001.safetensors"}}
    (broken / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: a shard must be .* beside it, got '../model"):
        TextEncoder.from_folder(broken)


def test_an_adapter_beside_the_weights_is_refused(broken):
    (broken / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        TextEncoder.from_folder(broken)


# numbers and files that do not fit each other


def refused(folder, message):
    """Loading is refused in one line, at once, and takes no memory."""
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        TextEncoder.from_folder(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert time.process_time() - start < 10


HOSTILE = (-1, 0, 2**20 + 1, 2**63, 10**400, 2.5, "12", True, [3], float("nan"))
COUNTS = [
    *(("text_encoder", f"{name}") for name in ("hidden_size", "intermediate_size", "vocab_size")),
    ("text_encoder", "num_attention_heads"),
    ("text_encoder", "max_position_embeddings"),
    ("text_encoder", "num_hidden_layers"),
    *(("text_encoder_2", name) for name in ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size")),
    ("text_encoder_2", "num_layers"),
    ("text_encoder_2", "relative_attention_num_buckets"),
    ("text_encoder_2", "relative_attention_max_distance"),
]


@pytest.mark.parametrize(("part", "name"), COUNTS)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: f"{value!r:.12}")
def test_a_hostile_size_is_refused_by_name(broken, part, name, value):
    change_config(broken / part / "config.json", **{name: value})
    refused(broken, rf"{part}: {name} must be int from \d+ to \d+, got ")


@pytest.mark.parametrize(("part", "name"), COUNTS)
def test_a_size_that_the_weights_do_not_have_is_refused_before_memory_is_taken(broken, part, name):
    path = broken / part / "config.json"
    change_config(path, **{name: json.loads(path.read_text())[name] * 2})
    if name == "num_attention_heads" or name == "relative_attention_max_distance":
        TextEncoder.from_folder(broken)  # no tensor's shape depends on it
    else:
        refused(broken, rf"{part}: \d+ (mismatched|missing) tensors")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_encoder", "layer_norm_eps", float("inf")),
        ("text_encoder", "layer_norm_eps", -1e-5),
        ("text_encoder", "attention_dropout", 2),
        ("text_encoder", "hidden_act", 7),
        ("text_encoder", "hidden_act", "no such function"),
        ("text_encoder", "num_attention_heads", 7),
        ("text_encoder_2", "layer_norm_epsilon", "small"),
        ("text_encoder_2", "feed_forward_proj", "gated-" * 30),
        ("text_encoder_2", "feed_forward_proj", "gated-nothing"),
        ("text_encoder_2", "num_decoder_layers", 10**9),
        ("text_encoder_2", "relative_attention_max_distance", 8),
        ("text_encoder_2", "tie_word_embeddings", "yes"),
    ],
)
def test_another_hostile_field_is_refused(broken, part, name, value):
    change_config(broken / part / "config.json", **{name: value})
    refused(broken, rf"{part}: ")


def test_fields_that_are_not_of_the_encoder_are_not_read(broken, encoder):
    change_config(broken / "text_encoder" / "config.json", output_hidden_states=True, zzz=1e999)
    change_config(broken / "text_encoder_2" / "config.json", return_dict=False, n_positions=10**30)
    found, wanted = TextEncoder.from_folder(broken).encode(["a"]), encoder.encode(["a"])
    assert all(map(torch.equal, found, wanted))


def test_sharded_weights_are_compared_with_their_index(broken):
    from safetensors.torch import load_file, save_file

    folder = broken / "text_encoder_2"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: weights[name] for name in names if places[name] == shard}
        save_file(held, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    TextEncoder.from_folder(broken)
    places[names[0]] = "model-1.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    refused(broken, r"model-\d.safetensors: holds other tensors than the index says")


def test_weights_of_eight_bits_are_refused_by_name(broken):
    from safetensors.torch import load_file, save_file

    path = broken / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, path, {"format": "pt"})
    refused(broken, "text_encoder: 1 quantised tensors")


# tokenizers


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_vocabulary_is_refused(broken, part):
    (broken / part / "tokenizer.json").unlink()
    for extra in ("vocab.json", "merges.txt"):
        (broken / part / extra).unlink(missing_ok=True)
    refused(broken, f"{part}: has no tokenizer.json")


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rename_vocab(data):
    data["model"]["vocabulary"] = data["model"].pop("vocab")


def empty_vocab(data):
    data["model"]["vocab"] = type(data["model"]["vocab"])()


def no_model(data):
    data["model"] = None


def another_model(data):
    data["model"]["type"] = "WordLevel"


def no_marks(data):
    data["post_processor"] = None


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("change", [rename_vocab, empty_vocab, no_model, another_model])
def test_a_tokenizer_in_which_nothing_has_a_meaning_is_refused(broken, part, change):
    change_tokenizer(broken / part, change)
    refused(broken, f"{part}/tokenizer.json: ")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "x", None])
def test_scores_that_are_no_numbers_are_refused(broken, score):
    def change(data):
        data["model"]["vocab"][10][1] = score

    change_tokenizer(broken / "tokenizer_2", change)
    refused(broken, "the vocab must be pairs of a text and a finite number")


@pytest.mark.parametrize("length", [None, True, 0, 2, 78, -(10**30), 1e30])
def test_a_length_that_clip_has_no_positions_for_is_refused(broken, length):
    change_config(broken / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    refused(broken, "tokenizer: model_max_length must be int from 3 to 77")


def test_t5_may_have_no_limit_of_its_own(broken):
    path = broken / "tokenizer_2" / "tokenizer_config.json"
    change_config(path, model_max_length=10**30)
    assert TextEncoder.from_folder(broken).max_sequence_length == 512
    change_config(path, model_max_length=-5)
    refused(broken, "model_max_length must be int from 1")


@pytest.mark.parametrize(
    ("part", "mark"),
    [
        (part, f"{mark}_token")
        for part in ("tokenizer", "tokenizer_2")
        for mark in ("eos", "pad", "unk")
    ]
    + [("tokenizer", "bos_token")],
)
@pytest.mark.parametrize("token", ["a new token", "a", "red</w>", "\ud800", 7, None, {"a": 1}])
def test_another_mark_is_refused_or_changes_nothing(broken, encoder, part, mark, token):
    change_config(broken / part / "tokenizer_config.json", **{mark: token})
    try:
        found = TextEncoder.from_folder(broken)
    except ValueError as error:
        assert re.search(rf"{part}: ", str(error)) and "\n" not in str(error)
        return
    if mark == "pad_token":  # CLIP's padding is what the file says
        return
    assert all(map(torch.equal, found.encode(["a b"]), encoder.encode(["a b"])))


def test_marks_of_the_encoder_that_the_tokenizer_does_not_set_are_refused(broken):
    change_config(broken / "text_encoder" / "config.json", eos_token_id=5)
    refused(broken, r"tokenizer: its eos_token is \d+, that of its encoder 5")
    change_config(broken / "text_encoder" / "config.json", eos_token_id=2)  # the highest token
    TextEncoder.from_folder(broken)
    change_config(broken / "text_encoder_2" / "config.json", eos_token_id=7)
    refused(broken, "tokenizer_2: its eos_token is 1, that of its encoder 7")
    change_config(broken / "text_encoder_2" / "config.json", eos_token_id=1, pad_token_id=9)
    refused(broken, "tokenizer_2: its pad_token is 0, that of its encoder 9")


def test_tokens_that_the_encoder_has_no_rows_for_are_refused(broken, folder):
    change_config(broken / "tokenizer" / "tokenizer_config.json", additional_special_tokens=["<x>"])
    refused(broken, r"tokenizer: has tokens up to \d+, its encoder has \d+")
    narrow = TextEncoder.from_folder(folder)
    narrow.t5.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"T5's tokenizer gives the token \d+, its encoder has 20"):
        narrow.encode(["a yellow star"])


def map_of(units, strings):
    return base64.b64encode(struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + strings)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "!!!",
        7,
        base64.b64encode(b"\1\0\0\0" + bytes(9)).decode(),
        base64.b64encode(b"\xff\xff\xff\xff" + bytes(64)).decode(),
        map_of([0] * 256, b"A" * 300 + b"\0").decode(),
        map_of([0] * 256, b"no end").decode(),
    ],
)
def test_a_damaged_map_of_characters_is_refused(broken, damaged):
    def change(data):
        data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": damaged}

    change_tokenizer(broken / "tokenizer_2", change)
    refused(broken, "tokenizer_2")


def test_a_map_that_leads_nowhere_is_an_error_in_one_line(broken):
    """The library's Rust panics, which is no Exception."""
    rng = random.Random(0)
    raised = 0
    for _ in range(20):
        units = [rng.randrange(2**32) for _ in range(256)]
        text = map_of(units, b"a\0").decode()

        def change(data, text=text):
            data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": text}

        change_tokenizer(broken / "tokenizer_2", change)
        try:
            TextEncoder.from_folder(broken).encode(["any text, 圆 Öl"])
        except ValueError as error:
            raised += 1
            assert "\n" not in str(error)
    assert raised


def test_a_panic_is_one_line_and_other_ends_of_a_program_are_not_swallowed():
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(ValueError, match="x: PanicException: two lines"),
        text_encoder._short_errors("x"),
    ):
        raise panic("two\nlines")
    with pytest.raises(KeyboardInterrupt), text_encoder._short_errors("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_files_of_a_tokenizer_are_bounded_and_regular(broken, part):
    extra = broken / part / "special_tokens_map.json"
    with open(extra, "wb") as file:
        file.truncate(text_encoder.TOKENIZER_LIMIT + 1)
    refused(broken, "special_tokens_map.json: larger than")
    extra.unlink()
    extra.symlink_to("/dev/zero")
    refused(broken, "special_tokens_map.json is not a file")
    extra.unlink()
    change_config(broken / part / "tokenizer_config.json", extra_ids=10**9)
    refused(broken, "extra_ids must be int from 0 to 1000")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize(
    "name",
    ["tokenizer/tokenizer.json", "text_encoder/config.json", "text_encoder_2/model.safetensors"],
)
def test_links_obey_the_rule_of_all_files(broken, name):
    outside = broken / "outside"
    (broken / name).rename(outside)
    (broken / name).symlink_to(outside)
    TextEncoder.from_folder(broken)
    os.chown(outside, 54321, -1)
    refused(broken, "leads out of its folder, to a file of another user")


def test_a_saved_tokenizer_does_not_depend_on_what_was_encoded(folder, tmp_path):
    used = TextEncoder.from_folder(folder)
    used.save(tmp_path / "before")
    used.encode(["a red circle " * 50], max_sequence_length=7)
    used.save(tmp_path / "after")
    for name in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"):
        before, after = ((tmp_path / when / name).read_bytes() for when in ("before", "after"))
        assert before == after
        assert json.loads(after)["truncation"] is None and json.loads(after)["padding"] is None


# prompts that take long


@pytest.mark.parametrize(
    "text",
    [" ", "a", "\n", "-", "🟢", "e\u0301", "A", "<|endoftext|>", "</s>", "\ufdfa", "_-", "'"],
)
def test_the_time_of_a_long_prompt_grows_with_its_length(encoder, text):
    def seconds(count):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder.encode(["a" + text * count + "b"])
        return time.process_time() - start

    seconds(10)
    short, long = (min(seconds(count) for _ in range(3)) for count in (5_000, 50_000))
    assert long < 40 * short + 0.5


def test_a_prompt_has_a_limit(encoder):
    with pytest.raises(
        ValueError, match="prompt must have at most 1048576 characters, got 1048577"
    ):
        encoder.encode(["a" * (text_encoder.TEXT_LIMIT + 1)])
