"""Text encoding against diffusers, what is cut is said aloud, and folders that ask for too much."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FluxPipeline
from tiny_flux import tiny_text

from fluxkern.compact.text import T5_LENGTH
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
    with pytest.raises(ValueError, match="text_encoder_2: cannot be loaded") as caught:
        TextEncoder.from_folder(broken)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(broken):
    weights = broken / "text_encoder" / "model.safetensors"
    weights.unlink()
    torch.save({"x": torch.zeros(1)}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="text_encoder: cannot be loaded"):
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
