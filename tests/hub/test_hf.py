"""Hugging Face folders: every family equals transformers to the bit, in and out; or is refused.

Two-process checks run this file as a script (`worker_*`), see test_dist.py.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import evaluate
import train_sft
from nanomath import dist as nd
from nanomath.base.config import parse
from nanomath.engine.stream import sample_groups
from nanomath.hub import hf
from nanomath.hub.hf_config import make_config
from nanomath.model import ModelConfig, Transformer
from nanomath.play import export, sample
from nanomath.run import checkpoint as ck
from nanomath.run import load, presets
from nanomath.run.guard import raise_together
from nanomath.text.tokenizer import Tokenizer

spec = importlib.util.spec_from_file_location(
    "dist_tests", Path(__file__).parents[1] / "nanomath" / "test_dist.py"
)
dist_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dist_tests)

LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


# Family -> class in transformers and what differs from BASE. Contexts are small, so that the rows
# of 100 tokens go past the original range of every scaled rope.
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama1": ("Llama", {"rope_parameters": plain(1e4)}),
    "llama2_gqa": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"num_key_value_heads": 1, "rope_parameters": plain(5e5)}),
    "llama3.1": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama3.2_tied": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": LLAMA3 | {"factor": 32.0},
            "head_dim": 20,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_llm": ("Llama", {"num_hidden_layers": 5, "intermediate_size": 37}),
    "deepseek_llm_67b": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "deepseek_coder": ("Llama", {"rope_parameters": LINEAR}),
    "deepseekmath": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 2} | {"num_key_value_heads": 2},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": plain(1e6)}),
    "qwen2.5_tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_mha": ("Qwen2", {"vocab_size": 131, "hidden_size": 40}),
    "qwen3": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 20, "rope_parameters": plain(1e6)},
    ),
    "qwen3_tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_uneven": (  # heads do not divide the width
        "Qwen3",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Return transformers' model with random weights, and the folder it wrote in small files."""
    transformers = pytest.importorskip("transformers")
    kind, changes = FAMILIES[request.param]
    config = getattr(transformers, f"{kind}Config")(**(BASE | changes))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(request.param))
    for name, parameter in theirs.named_parameters():
        around = 1.0 if "norm" in name else 0.0
        parameter.data = around + 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return theirs, folder


def tokens(rows, length, vocab, seed=1):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- equal to transformers


def test_logits_and_gradients_equal_transformers(family):
    """fp32 logits equal transformers' to the bit, also far past the context; gradients to 1e-6."""
    theirs, folder = family
    ours, tokenizer = hf.load_hf(folder)
    assert tokenizer is None
    assert ours.cfg.num_parameters == sum(p.numel() for p in theirs.parameters())
    tokens_BT = tokens(3, 100, ours.cfg.vocab_size)
    our_logits, their_logits = ours(tokens_BT), theirs(tokens_BT).logits
    assert torch.equal(our_logits, their_logits)
    far = torch.arange(1000, 1100)[None].expand(3, -1)
    far_logits = ours(tokens_BT, positions_BT=far)
    assert torch.equal(far_logits, theirs(tokens_BT, position_ids=far).logits)
    assert their_logits.std() > 0.5 and not torch.equal(far_logits, our_logits)
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[hf.llama_name(name)], rtol=1e-5, atol=1e-6, msg=name
        )


def test_unequal_lengths_equal_transformers(family):
    """Rows of unequal lengths, padded on the right, equal transformers' under its mask to 1e-6.

    Not to the bit: with a mask transformers' attention runs another CPU kernel, which sums in
    another order. Each row alone, without padding, is equal to the bit.
    """
    theirs, folder = family
    ours, _ = hf.load_hf(folder)
    tokens_BT = tokens(4, 60, ours.cfg.vocab_size)
    lengths = torch.tensor([60, 1, 17, 43])
    mask_BT = torch.arange(60) < lengths[:, None]
    with torch.no_grad():
        our_logits = ours(tokens_BT)
        their_logits = theirs(tokens_BT, attention_mask=mask_BT.long()).logits
        scale = their_logits.abs().max()
        gap = (our_logits - their_logits)[mask_BT].abs().max() / scale
        assert gap < 1e-6
        for row, length in zip(tokens_BT, lengths.tolist()):
            alone = row[None, :length]
            assert torch.equal(ours(alone), theirs(alone).logits)


def test_cached_decoding_equals_the_full_pass(family):
    """In float64, decoding behind shared prompts gives the full pass's log-probabilities."""
    _, folder = family
    ours, _ = hf.load_hf(folder, dtype=torch.float64)
    prompts = [
        tokens(1, length, ours.cfg.vocab_size, seed=length)[0].tolist() for length in (5, 19)
    ]
    rollouts = sample_groups(ours, prompts, 2, max_new_tokens=30, eos_ids=())
    for prompt, tokens_GT, logp_GT in zip(prompts, rollouts.tokens_PGT, rollouts.logp_PGT):
        for own, logp in zip(tokens_GT, logp_GT):
            with torch.no_grad():
                full = ours(torch.tensor([prompt + own.tolist()]))[0, len(prompt) - 1 : -1]
            expected = full.log_softmax(-1).gather(-1, own[:, None])[:, 0]
            assert logp.dtype == torch.float64 and len(logp) == 30
            torch.testing.assert_close(logp, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_export_equals_transformers(family, tmp_path, max_file_bytes):
    """What is exported loads in transformers with the same logits to the bit, and here again."""
    transformers = pytest.importorskip("transformers")
    theirs, folder = family
    ours, _ = hf.load_hf(folder)
    out = tmp_path / "out"
    hf.save_hf(ours, None, out, dtype=torch.float32, max_file_bytes=max_file_bytes)
    many = max_file_bytes < 10**9
    assert (len(list(out.glob("*.safetensors"))) > 3) == many == (out / hf.INDEX).exists()
    config = json.loads((out / "config.json").read_text())
    assert "rope_theta" in config and "rope_parameters" not in config
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(again) is type(theirs) and again.dtype == torch.float32
    for ids in (tokens(2, 100, ours.cfg.vocab_size), tokens(1, 3, ours.cfg.vocab_size, seed=3)):
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    back, _, state = load.load_model(out)
    assert state == {} and back.cfg == ours.cfg
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    if many:
        index = json.loads((out / hf.INDEX).read_text())
        whole = {}
        for path in out.glob("*.safetensors"):
            whole |= load_file(path)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
        assert index["weight_map"].keys() == whole.keys()


def test_old_and_new_rope_keys_are_one(family, tmp_path):
    """transformers 5's rope_parameters and transformers 4's rope_theta, rope_scaling read alike."""
    _, folder = family
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config
    expected = hf.read_config(folder / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    for key in ("type", "rope_type"):
        scaling = None if kind == "default" else {key: kind, **rope}
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        assert hf.read_config(tmp_path / "config.json") == expected


def test_old_files_leave_keys_out(tmp_path):
    """Llama 1's config.json has no num_key_value_heads and no rope_theta: heads, and 10,000."""
    cfg = ModelConfig(97, 2, 24, 4, 4, 40, rope_theta=10000.0)
    config = make_config(cfg, None, torch.float32)
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "head_dim"):
        del config[key]
    for kv_heads in ({}, {"num_key_value_heads": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | kv_heads))
        assert hf.read_config(tmp_path / "config.json") == cfg


# ---------------------------------------------------------------------------- one small folder

CFG = ModelConfig(300, 2, 24, 4, 2, 40, max_context=64, qkv_bias=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Numbers: 1 2 3\nTarget: 6\n1+2=3 für ÷ 中文"] * 3, 290)


def random_model(cfg=CFG, seed=0):
    model = Transformer(cfg)
    model.init_weights(seed, std=0.2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def folder(tmp_path, tokenizer):
    """An exported folder of several files, with a tokenizer."""
    hf.save_hf(random_model(), tokenizer, tmp_path / "hf", dtype=torch.float32, max_file_bytes=9000)
    return tmp_path / "hf"


def test_export_from_the_command_line_is_complete(tmp_path, tokenizer, monkeypatch, capsys):
    """A run exports to a folder that transformers loads whole: bf16 weights, ids, special ids."""
    transformers = pytest.importorskip("transformers")
    model = random_model()
    checkpoints = (tmp_path / "run", {"model": model}, None, tokenizer, dist_tests.ALONE)
    ck.Checkpoints(*checkpoints).save(7, {})
    argv = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    export.main(parse(export.Config, argv=argv))
    assert "wrote" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read the settings may read the weights
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.eos_token_id == list(tokenizer.stop_ids)
    assert theirs.config.eos_token_id == tokenizer.eos_id
    for name, parameter in model.named_parameters():
        stored = theirs.get_parameter(hf.llama_name(name))
        assert torch.equal(stored, parameter.bfloat16()), name
    text = "Numbers: 7 8\nTarget: 15 für ÷ 中文 <think>"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert ids == tokenizer.encode(text, bos=True)
    masters, again = hf.load_hf(tmp_path / "out")
    assert again.encode(text, bos=True) == ids and again.stop_ids == tokenizer.stop_ids
    for name, parameter in masters.named_parameters():  # bf16 files, fp32 weights
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).bfloat16().float()), name
    with pytest.raises(FileExistsError, match="out exists"):
        export.main(parse(export.Config, argv=argv))


def test_every_command_takes_a_folder(folder, tmp_path, monkeypatch, capsys):
    """SFT starts from a Hugging Face folder, evaluation and the sampler read one, as from a run."""
    (tmp_path / "sft.jsonl").write_text('{"prompt": "Numbers: 1 2", "solution": "1+2"}\n' * 40)
    argv = ["train_sft.py", "--preset", "smoke", "--init", folder, "--data", tmp_path / "sft.jsonl"]
    argv += [
        "--run_dir",
        tmp_path / "run",
        "--num_steps",
        "2",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    train_sft.main()
    trained, tokenizer, state = load.load_model(tmp_path / "run")
    assert state["step"] == 2 and trained.cfg == CFG and tokenizer is not None
    start, _, _ = load.load_model(folder)
    biases = [(a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters())]
    assert min(biases) > 0  # every tensor is trained, biases too
    cfg = parse(
        evaluate.EvalConfig, presets.EVALUATION, ["--preset", "smoke", "--checkpoint", str(folder)]
    )
    model = evaluate.open_model(cfg, dist_tests.ALONE)[0]
    assert torch.equal(model(tokens(1, 9, 300)), start(tokens(1, 9, 300)))
    capsys.readouterr()
    sample.main(
        sample.Config(str(folder), prompt="1 2", max_new_tokens=3, num_samples=2, device="cpu")
    )
    assert capsys.readouterr().out.count("--- sample") == 2


def test_export_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """A failing disk leaves neither the folder nor a temporary one; an existing one is kept."""
    model, out = random_model(), tmp_path / "out"
    real, calls, state = os.fsync, [], {}

    def failing(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        if len(calls) == state["fail_at"]:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for fail_at in (1, 3):
        state["fail_at"] = fail_at
        calls.clear()
        with pytest.raises(OSError, match="could not write .*out: .*No space left"):
            hf.save_hf(model, None, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    state["fail_at"] = 0
    calls.clear()
    hf.save_hf(model, None, out)
    written = [f".tmp-out/{path.name}" for path in out.iterdir()] + [".tmp-out"]
    assert {str(tmp_path / name) for name in written} <= {*calls[:-1]}
    assert calls[-1] == str(tmp_path)  # the new name, too, is on the disk
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="export to a new folder"):
        hf.save_hf(random_model(seed=1), None, out)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"qk_norm": True}, "both qk_norm and qkv_bias"),
        ({"head_width": 10}, "Qwen2ForCausalLM has no head_width"),
        (
            {"qkv_bias": False, "width": 22, "head_width": 6},
            "width 22 to be a multiple of num_heads 4",
        ),
    ],
)
def test_shapes_without_a_family_are_not_exported(tmp_path, tokenizer, changes, words):
    """A shape that no known architecture has is refused, and nothing is written."""
    cfg = ModelConfig(**(CFG.__dict__ | changes))
    with pytest.raises(ValueError, match=words):
        hf.save_hf(Transformer(cfg), None, tmp_path / "out")
    small = ModelConfig(**(CFG.__dict__ | {"vocab_size": tokenizer.vocab_size - 1}))
    with pytest.raises(ValueError, match="the tokenizer has .* ids, the model"):
        hf.save_hf(Transformer(small), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- refused


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def first_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


CONFIG_CASES = {
    "model_type": ("mixtral", "model_type is 'mixtral'; known are llama, qwen2, qwen3"),
    "model_type ": ([], "model_type is"),
    "architectures": (
        ["Qwen2ForSequenceClassification"],
        "architectures is .* is read as Qwen2For",
    ),
    "auto_map": ({"AutoModel": "modeling_x.Model"}, "auto_map: the model needs Python code"),
    "hidden_size": (None, "hidden_size is null or missing; it must be an integer"),
    "vocab_size ": (2**31 - 1, "config.json asks for 1.031e.11 parameters"),
    "hidden_size ": (2**31 - 8, "config.json asks for .*e.19 parameters, the files hold"),
    "vocab_size": (300.0, "vocab_size is 300.0 or missing; it must be an integer"),
    "num_hidden_layers": (True, "num_hidden_layers is true"),
    "num_hidden_layers ": (
        10**9,
        "config.json asks for 4.704e.12 parameters, the files hold 2.383e",
    ),
    "num_key_value_heads": (None, "num_key_value_heads is null"),
    "num_key_value_heads ": (3, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "intermediate_size": (2**80, "intermediate_size is"),
    "intermediate_size ": (41, "down_proj.weight has shape .24, 40., config.json asks .24, 41."),
    "rms_norm_eps": (None, "rms_norm_eps is null or missing; it must be a finite number"),
    "rms_norm_eps ": (float("nan"), "rms_norm_eps is NaN"),
    "max_position_embeddings": ("64", 'max_position_embeddings is "64"'),
    "rope_theta": (None, "rope_theta is null"),
    "rope_theta ": (-1.0, "rope_theta is -1.0; it must be finite and > 0"),
    "rope_scaling": (
        {"type": "yarn", "factor": 4.0},
        "rope type 'yarn'; known are default, linear",
    ),
    "rope_scaling ": ({"rope_type": "dynamic", "factor": 4.0}, "rope type 'dynamic'"),
    "rope_scaling  ": ({"type": "linear"}, "factor is null or missing"),
    "rope_scaling   ": ({"type": "linear", "factor": 2, "beta": 1}, "more than linear rope has"),
    "rope_scaling    ": ({"full_attention": {"rope_theta": 1.0}}, "more than default rope has"),
    "rope_scaling     ": ([1], "must be an object"),
    "rope_scaling      ": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "more than"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 5.0}, "give one of the two"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor is 0.5; only 1 is supported"),
    "model_type  ": ("qwen3", "head_dim is null or missing; it must be an integer"),
    "hidden_act": ("gelu", "hidden_act is 'gelu'; only 'silu' is supported"),
    "use_sliding_window": (True, "use_sliding_window is True"),
    "layer_types": (["full_attention", "sliding_attention"], "layer_types: only full_attention"),
    "layer_types ": (3, "layer_types: only full_attention"),
    "attention_bias": (True, "attention_bias is True; only False is supported"),
    "mlp_bias": (True, "mlp_bias is True"),
    "quantization_config": ({"bits": 4}, "quantization_config is"),
    "tie_word_embeddings": ("yes", "tie_word_embeddings must be true or false"),
    "tie_word_embeddings ": (True, "lm_head.weight is not model.embed_tokens.weight"),
    "head_dim": (7, "head width 7 is odd"),
}


@pytest.mark.parametrize("key", CONFIG_CASES)
def test_configs_that_are_refused(folder, key):
    """What model.py is not exactly, and what is no number, is refused with file and field."""
    value, words = CONFIG_CASES[key]
    (folder / "modeling_x.py").write_text("raise SystemExit('code was run')")
    others = {
        "rope_parameters": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "model_type  ": {"architectures": ["Qwen3ForCausalLM"]},
    }.get(key, {})
    edit(folder / "config.json", lambda config: config.update({key.strip(): value} | others))
    with pytest.raises(ValueError, match=words) as error:
        load.load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def cut(path, part=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


FILE_CASES = {
    "config cut short": (lambda f: cut(f / "config.json"), "config.json: not JSON"),
    "empty config": (lambda f: cut(f / "config.json", 0), "config.json: not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "No such file .*/config.json"),
    "index cut short": (lambda f: cut(f / hf.INDEX), "index.json: not JSON"),
    "tokenizer cut short": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json: not JSON"),
    "weights cut short": (lambda f: cut(first_file(f)), "not a whole safetensors file"),
    "weights short by a byte": (lambda f: cut(first_file(f), 0.9999), "not a whole safetensors"),
    "empty weights": (lambda f: cut(first_file(f), 0), "not a whole safetensors file"),
    "missing file": (lambda f: first_file(f).unlink(), "model-00001.*: not a whole .*No such file"),
    "missing tensor": (
        lambda f: rewrite(first_file(f), lambda t: t.popitem()),
        "tensor .* is missing, which config.json asks for",
    ),
    "missing in both": (
        lambda f: (
            rewrite(first_file(f), lambda t: t.pop("model.embed_tokens.weight")),
            edit(f / hf.INDEX, lambda i: i["weight_map"].pop("model.embed_tokens.weight")),
        ),
        "tensor model.embed_tokens.weight is missing",
    ),
    "extra tensor": (
        lambda f: rewrite(first_file(f), lambda t: t.update({"model.inv_freq": torch.ones(2)})),
        "tensor model.inv_freq has no place",
    ),
    "tensor in two files": (
        lambda f: rewrite(
            sorted(f.glob("*.safetensors"))[1],
            lambda t: t.update(load_file(first_file(f))),
        ),
        "is also in model-00001",
    ),
    "misshaped tensor": (
        lambda f: rewrite(
            first_file(f), lambda t: t.update({"model.embed_tokens.weight": torch.ones(299, 24)})
        ),
        r"embed_tokens.weight has shape \[299, 24\], config.json asks \[300, 24\]",
    ),
    "integer tensor": (
        lambda f: rewrite(
            first_file(f),
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(300, 24).char()}),
        ),
        "embed_tokens.weight is of type I8",
    ),
    "weight_map is a list": (
        lambda f: edit(f / hf.INDEX, lambda i: i.update(weight_map=[])),
        "weight_map is missing, or no object",
    ),
    "pickles only": (
        lambda f: [path.rename(path.with_suffix(".bin")) for path in f.glob("model*")],
        "holds neither model.safetensors nor .*never read",
    ),
    "larger tokenizer": (
        lambda f: edit(f / "config.json", lambda config: config.update(vocab_size=200)),
        "tokenizer.json has ids up to 2.., but the vocab_size of config.json is 200",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILE_CASES)
def test_files_that_are_refused(folder, case):
    """Missing, damaged, doubled and left-over files and tensors are refused by name."""
    spoil, words = FILE_CASES[case]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load.load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["../hf/x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", None, 3,
     "x.safetensors\n", "a\\b.safetensors", "x.safetensors\x00"],
)  # fmt: skip
def test_index_entries_are_plain_names(folder, name):
    """An index never leads out of its folder, nor to a file of another kind."""
    edit(folder / hf.INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(ValueError, match="index.json: weight_map sends lm_head.weight to"):
        hf.load_hf(folder)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_float_type_are_read(tmp_path, stored):
    """Files in float64, fp16 and bf16 load as the dtype asked for, rounded once."""
    model = random_model()
    hf.save_hf(model, None, tmp_path / "hf", dtype=stored)
    for dtype in (torch.float32, torch.bfloat16):
        again = load.load_model(tmp_path / "hf", dtype=dtype)[0]
        for name, parameter in again.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, model.get_parameter(name).to(stored).to(dtype)), name


def test_known_extras_are_accepted(tmp_path):
    """Old files' rotary buffers are ignored; a tied model's head is, if it is the embedding."""
    cfg = ModelConfig(**(CFG.__dict__ | {"tied_head": True}))
    model = random_model(cfg)
    hf.save_hf(model, None, tmp_path / "hf", dtype=torch.float32)
    path = tmp_path / "hf" / "model.safetensors"
    assert "lm_head.weight" not in load_file(path)
    head = model.embedding.weight.detach().clone()
    rewrite(
        path,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": head}
        ),
    )
    again, _ = hf.load_hf(tmp_path / "hf")
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again(tokens(1, 9, 300)), model(tokens(1, 9, 300)))
    head[7, 3] += 1e-6
    rewrite(path, lambda t: t.update({"lm_head.weight": head}))
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight"):
        hf.load_hf(tmp_path / "hf")


def test_random_config_values_are_named_errors(folder):
    """Any JSON value in any place of config.json loads, or is a ValueError of one line."""
    path = folder / "config.json"
    (folder / "tokenizer.json").unlink()
    original = json.loads(path.read_text())
    values = [None, True, 0, -1, 1, 2.5, 1e400, 10**30, "x", [], ["x"], {}, {"type": None}, [[]]]
    refused = 0
    for key in original.keys() | {"rope_parameters", "auto_map", "layer_types", "head_dim"}:
        for value in values:
            path.write_text(json.dumps(original | {key: value}))
            try:
                hf.load_hf(folder)
            except ValueError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 150


def header_attacks(content, generator):
    """Yield damaged copies of a safetensors file: lengths, offsets, shapes, types, truncations."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]

    def build(header, claimed=None):
        text = json.dumps(header).encode() if isinstance(header, dict) else header
        return struct.pack("<Q", len(text) if claimed is None else claimed) + text + body

    names = [name for name in header if name != "__metadata__"]
    first, last = names[0], names[-1]
    for claimed in (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1):
        yield build(header, claimed)
    for offsets in ([0, 2**63], [-4, 0], [4, 0], [0, 0], [2**64, 2**64], [0], [0.5, 4], None, "x"):
        yield build(header | {last: header[last] | {"data_offsets": offsets}})
    yield build(header | {last: header[last] | {"data_offsets": header[first]["data_offsets"]}})
    for shape in ([2**62, 2**62], [-1, 4], [0], None, ["x"], [[1]]):
        yield build(header | {first: header[first] | {"shape": shape}})
    for kind in ("F8_E4M3", "C64", "F128", "", None, 3):
        yield build(header | {first: header[first] | {"dtype": kind}})
    yield build(header | {"x\x00y": header[first]})
    yield build(header | {"__metadata__": {"a": {"b": 1}}})
    yield build(b"[" * 100_000)
    yield build(b'{"\xff": 1}')
    for _ in range(150):
        damaged = bytearray(content)
        if generator.integers(2):
            damaged = damaged[: generator.integers(len(damaged))]
        else:
            for _ in range(generator.integers(1, 4)):
                damaged[generator.integers(8 + length)] = generator.integers(256)
        yield bytes(damaged)


def test_damaged_headers_are_named_errors(tmp_path):
    """Whatever stands in a safetensors header, loading ends well or in one named ValueError."""
    hf.save_hf(random_model(), None, tmp_path / "hf", dtype=torch.float32)
    path = tmp_path / "hf" / "model.safetensors"
    content = path.read_bytes()
    refused = accepted = 0
    for damaged in header_attacks(content, np.random.default_rng(0)):
        path.write_bytes(damaged)
        try:
            model, _ = hf.load_hf(tmp_path / "hf")
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), error
            refused += 1
        else:  # a change of white space or metadata: all tensors are there, as they were
            accepted += 1
            assert all(torch.isfinite(p).all() for p in model.parameters())
    assert refused > 150 and accepted < 25, (refused, accepted)


# ---------------------------------------------------------------------------- memory and shards


def worker_memory(out):
    """Write by how much this process grew, besides pages of mapped files, to load a model."""

    def anonymous():
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split("RssAnon:")[1].split()[0])

    peak, done = [], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak.append(anonymous())

    hf.load_hf(out / "tiny")  # what torch imports and allocates once
    thread = threading.Thread(target=watch)
    before = anonymous()
    thread.start()
    model, _ = hf.load_hf(out / "hf")
    done.set()
    thread.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    (out / "memory.json").write_text(json.dumps([max(peak) - before, size]))


def test_loading_takes_little_more_than_the_model(tmp_path):
    """Loading peaks at the model and one tensor, an eighth of it here."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see a process's memory")
    hf.save_hf(Transformer(CFG), None, tmp_path / "tiny")
    cfg = ModelConfig(4000, 5, 512, 4, 4, 1000)
    hf.save_hf(Transformer(cfg), None, tmp_path / "hf", max_file_bytes=10**7)
    environment = os.environ | {"PYTHONPATH": str(dist_tests.ROOT)}
    subprocess.run([sys.executable, __file__, "memory", tmp_path], check=True, env=environment)
    peak, size = json.loads((tmp_path / "memory.json").read_text())
    assert size == 4 * cfg.num_parameters
    assert peak < 1.15 * size, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def worker_shards(out):
    """Load into two shards, write the whole logits, export from the shards, refuse together."""
    dist = nd.setup("cpu", 1, timeout_s=60)
    with raise_together(dist):
        facts = {}
        for name in ("untied", "tied"):
            model, _, _ = load.load_model(out / name, dist)
            facts[name] = sum(nd.local(p).numel() for p in model.parameters())
            logits = model(tokens(2, 30, 301))
            hf.save_hf(model, None, out / f"{name}-again", dist, dtype=torch.float32)
            if dist.is_main:
                save_file({"logits": logits.detach()}, out / f"{name}.safetensors")
        (out / f"facts-{dist.rank}.json").write_text(json.dumps(facts))
        nd.barrier(dist)
    nd.cleanup(dist)


@pytest.mark.slow
def test_two_processes_load_straight_into_shards(tmp_path):
    """Two ranks hold half each, give the logits of the whole model, and export it to the bit."""
    models = {}
    for name in ("untied", "tied"):
        cfg = ModelConfig(301, 2, 24, 4, 2, 41, tied_head=name == "tied", qk_norm=True)
        models[name] = random_model(cfg)
        hf.save_hf(models[name], None, tmp_path / name, dtype=torch.float32, max_file_bytes=9000)
    statuses = dist_tests.launch("shards", tmp_path, 2, file=__file__)
    assert [status for status, _ in statuses] == [0, 0], statuses
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    for name, model in models.items():
        logits = load_file(tmp_path / f"{name}.safetensors")["logits"]
        assert torch.equal(logits, model(tokens(2, 30, 301)))
        total = model.cfg.num_parameters
        assert facts[0][name] + facts[1][name] == total
        assert abs(facts[0][name] - facts[1][name]) < 0.02 * total
        again, _ = hf.load_hf(tmp_path / f"{name}-again")
        for key, parameter in again.named_parameters():
            assert torch.equal(parameter, model.get_parameter(key)), key


if __name__ == "__main__":
    globals()[f"worker_{sys.argv[1]}"](Path(sys.argv[2]))
