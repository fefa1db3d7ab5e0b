"""The compact model's tokenizers and text encoders."""

import re
import secrets

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fluxkern.compact import text
from fluxkern.compact.drawings import COLOURS, POSITIONS, SHAPES, SIZES, caption, random_scene

PROMPTS = [
    "",
    " ",
    "A Red Circle on a BLUE background",
    "été 漢字 🙂 ÀÉ <pad> </s>",
    "a strange wide-angle photo, 35mm; it's 100% new!",
    "a red circle " * 300,
    "\x00\t\n\u200b",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact")
    text.build_tokenizers(path)
    return path


@pytest.fixture(scope="module")
def tokenizers(folder):
    return text.load_tokenizers(folder)


@pytest.fixture
def seed():
    value = secrets.randbelow(2**31)
    print(f"seed {value}")
    return value


def padded(tokenizer, prompt):
    return tokenizer(prompt, padding="max_length", truncation=True).input_ids


def test_building_the_tokenizers_twice_writes_the_same_bytes(folder, tmp_path):
    text.build_tokenizers(tmp_path)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(names) >= 6
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_building_over_an_older_folder_leaves_nothing_of_it(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "stale.json").write_text("{}")
    text.build_tokenizers(tmp_path)
    assert not (tmp_path / "tokenizer" / "stale.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer", "tokenizer_2"]


def test_every_word_of_the_drawings_is_one_token(tokenizers):
    names = " ".join([*SHAPES, *COLOURS, *SIZES, *POSITIONS])
    for word in names.split():
        assert len(tokenizers.clip.tokenize(word)) == 1, word
        assert len(tokenizers.t5.tokenize(word)) == 1, word


def test_captions_are_never_spelled_and_fit(tokenizers, seed):
    rng = np.random.default_rng(seed)
    for i in range(2000):
        caption_ = caption(random_scene(rng), rng, complete=i % 2 == 0)
        clip, t5 = (tokenizer.tokenize(caption_) for tokenizer in tokenizers)
        assert all(token.endswith("</w>") for token in clip), caption_
        assert all(len(token) > 1 or not token.isalpha() for token in t5), caption_
        assert "<unk>" not in t5, caption_
        assert max(len(clip), len(t5)) < text.T5_LENGTH


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_ends_with_eos_and_is_padded_to_the_model_length(tokenizers, prompt):
    clip, t5 = tokenizers
    ids = padded(clip, prompt)
    end = ids.index(clip.eos_token_id)
    assert len(ids) == 77 and ids[0] == clip.bos_token_id
    assert set(ids[end:]) == {clip.eos_token_id}
    ids = padded(t5, prompt)
    end = ids.index(1) if "</s>" not in prompt else len(ids) - 1 - ids[::-1].index(1)
    assert len(ids) == 32 and set(ids[end + 1 :]) <= {0}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_files_mean_the_same_to_tokenizers_alone(folder, tokenizers, prompt):
    """transformers rebuilds both backends from parts of the file: nothing may be lost."""
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        raw = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
        raw.no_padding()
        raw.no_truncation()
        assert raw.encode(prompt).ids == tokenizer(prompt, verbose=False).input_ids


def test_clip_loads_from_vocab_and_merges_alone(folder, tokenizers, tmp_path):
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    clip = CLIPTokenizer.from_pretrained(str(tmp_path))
    for prompt in PROMPTS:
        assert padded(clip, prompt) == padded(tokenizers.clip, prompt)


def test_capitals_do_not_matter(tokenizers):
    for tokenizer in tokenizers:
        assert padded(tokenizer, "A Red CIRCLE, zZ") == padded(tokenizer, "a red circle, zz")
        assert padded(tokenizer, "a red circle") != padded(tokenizer, "a blue circle")


def test_special_tokens_stand_where_flux_has_them(tokenizers):
    clip, t5 = tokenizers
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert clip.bos_token_id == len(clip) - 2 and clip.eos_token_id == len(clip) - 1
    assert clip.pad_token_id == clip.eos_token_id
    assert (clip.model_max_length, t5.model_max_length) == (77, 32)
    assert len(t5) <= 600 and len(clip) <= 1024


def test_clip_spells_any_text_so_that_it_can_be_read_back(tokenizers):
    ids = tokenizers.clip("漢字 🙂 éà").input_ids
    assert tokenizers.clip.decode(ids, skip_special_tokens=True) == "漢字 🙂 éà"


def test_pooled_output_is_the_state_at_the_first_eos(tokenizers):
    clip, _ = text.build_encoders(tokenizers, seed=0)
    ids = torch.tensor([padded(tokenizers.clip, p) for p in ("a red circle", "", "star " * 99)])
    with torch.no_grad():
        out = clip(input_ids=ids)
    for row, end in enumerate((4, 1, 76)):
        assert ids[row, end] == tokenizers.clip.eos_token_id
        assert torch.equal(out.pooler_output[row], out.last_hidden_state[row, end])


def test_short_clip_padding_gives_the_vector_of_77_tokens(tokenizers):
    encoders = text.build_encoders(tokenizers, seed=1)
    prompts = ["a red circle", "a big white star on black"]
    ids = torch.tensor([padded(tokenizers.clip, prompt) for prompt in prompts])
    with torch.no_grad():
        txt, vec = text.encode(*encoders, tokenizers, prompts)
        full = encoders[0](input_ids=ids).pooler_output
    assert txt.shape == (2, 32, 128) and vec.shape == (2, 128)
    torch.testing.assert_close(vec, full, rtol=1e-4, atol=1e-5)


def test_t5_attends_to_its_padding(tokenizers):
    _, t5 = text.build_encoders(tokenizers, seed=1)
    ids = torch.tensor([padded(tokenizers.t5, "a red circle")])
    with torch.no_grad():
        seen = t5(input_ids=ids).last_hidden_state
        masked = t5(input_ids=ids, attention_mask=ids.ne(0).long()).last_hidden_state
    assert not torch.allclose(seen[:, :4], masked[:, :4], atol=1e-3)


def test_the_seed_fixes_the_encoders_and_leaves_the_global_state(tokenizers):
    before = torch.get_rng_state()
    first, second, other = (text.build_encoders(tokenizers, seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(first, second, other, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)
        assert not all(
            torch.equal(x, z) for x, z in zip(a.parameters(), c.parameters(), strict=True)
        )
        assert 250_000 < sum(p.numel() for p in a.parameters()) < 450_000


def test_pretraining_lowers_the_loss_and_moves_every_parameter(tokenizers, seed):
    encoders = text.build_encoders(tokenizers, seed=seed)
    before = [{k: v.detach().clone() for k, v in e.named_parameters()} for e in encoders]
    losses = []
    metrics = text.pretrain_encoders(
        *encoders,
        tokenizers,
        steps=60,
        batch_size=32,
        seed=seed,
        progress=lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(1, 61))
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert metrics["loss"] == losses[-1][1]
    assert metrics["clip_shape"] > 0.5 and metrics["t5_shape"] > 0.5  # chance is 1/6
    for name in ("colour", "background"):  # words without their places get at most 1/2
        assert metrics[f"t5_{name}"] > 0.75 and metrics[f"t5_held_out_{name}"] > 0.75, metrics
    assert 0.5 < metrics["t5_std"] < 2 and 0.5 < metrics["clip_std"] < 2
    for encoder, old in zip(encoders, before, strict=True):
        for name, parameter in encoder.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
            assert not torch.equal(parameter, old[name]), name


def test_pretraining_twice_gives_the_same_bits(tokenizers, seed):
    runs = [text.build_encoders(tokenizers, seed=0) for _ in range(2)]
    metrics = [
        text.pretrain_encoders(*run, tokenizers, steps=2, batch_size=8, seed=seed) for run in runs
    ]
    assert metrics[0] == metrics[1]
    for first, second in zip(*runs, strict=True):
        for x, y in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(x, y)


def test_what_a_caption_leaves_out_is_not_learned(seed):
    rng = np.random.default_rng(seed)
    left_out = 0
    for _ in range(200):
        scene = random_scene(rng)
        words = caption(scene, rng, complete=False)
        labels = dict(zip(text.ATTRIBUTES, text._labels(scene, words), strict=True))
        for name in ("colour", "background"):
            said = getattr(scene, name) in re.split(r"\W+", words.lower())
            assert (labels[name] == text.UNSAID) == (not said), words
            left_out += not said
        assert text.ATTRIBUTES["position"][labels["position"]] == scene.position
        assert text.ATTRIBUTES["texture"][labels["texture"]] == scene.texture
        assert (labels["other shape"] == text.UNSAID) == (scene.other is None)
        assert text.ATTRIBUTES["relation"][labels["relation"]] == (scene.relation or "none")
    assert left_out > 0


def test_a_batch_in_which_nobody_says_the_colour_has_a_finite_loss():
    logits = {name: torch.zeros(2, len(names)) for name, names in text.ATTRIBUTES.items()}
    labels = {name: torch.tensor([0, 1]) for name in text.ATTRIBUTES}
    labels["colour"] = torch.full((2,), text.UNSAID)
    sizes = [len(names) for name, names in text.ATTRIBUTES.items() if name != "colour"]
    expected = sum(np.log(size) for size in sizes) / len(text.ATTRIBUTES)
    assert text._loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_the_files_carry_the_tensor_names_of_flux(tokenizers, tmp_path):
    clip, t5 = text.build_encoders(tokenizers, seed=0)
    text.save_text(tmp_path, clip.half(), t5.half())
    first = load_file(tmp_path / "text_encoder" / "model.safetensors")
    second = load_file(tmp_path / "text_encoder_2" / "model.safetensors")
    assert first["text_model.embeddings.token_embedding.weight"].shape == (
        len(tokenizers.clip),
        128,
    )
    assert first["text_model.encoder.layers.1.self_attn.q_proj.bias"].shape == (128,)
    assert second["shared.weight"].shape == (len(tokenizers.t5), 128)
    assert second["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"].shape == (256, 128)
    for tensors, model in ((first, clip), (second, t5)):
        assert len(tensors) == len(list(model.parameters()))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_saved_encoders_load_to_the_same_bits_from_safetensors(tokenizers, tmp_path):
    encoders = text.build_encoders(tokenizers, seed=0)
    text.save_text(tmp_path, *encoders)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        f"{name}/{file}"
        for name in ("text_encoder", "text_encoder_2")
        for file in ("config.json", "model.safetensors")
    ]
    loaded = text.load_text(tmp_path)
    prompts = ["a red circle", ""]
    with torch.no_grad():
        for x, y in zip(
            text.encode(*encoders, tokenizers, prompts),
            text.encode(*loaded, tokenizers, prompts),
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_zero_steps_or_captions_are_refused_by_name(tokenizers, name):
    encoders = text.build_encoders(tokenizers, seed=0)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        text.pretrain_encoders(*encoders, tokenizers, **{name: 0})
