"""Language models: equal to transformers' on the same weights, from and to files, and what is said of bad files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_language import CASES, maker, reference, words, write_folder

from evoopt import trees
from evoopt.envs import language
from evoopt.envs.language import config as configs
from evoopt.envs.language import files, saving, trainable
from evoopt.envs.language.tokenizer import from_bpe

KEY = jax.random.key(3)


def loaded(tmp_path, case, **options):
    return language.load(write_folder(tmp_path / case, case), tokenizer=False, **options)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, mask=None):
    return model.apply(params, tokens, mask)


def inputs(found):
    tokens = jnp.array(found["tokens"], jnp.int32)
    return tokens, jnp.arange(tokens.shape[1]) < jnp.array(found["lengths"])[:, None]


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_transformers(tmp_path, case):
    found = reference(case)
    model, params, _ = loaded(tmp_path, case)
    answer = apply(model, params, *inputs(found))
    for row, expected in zip(answer, found["answer"], strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_saved_is_what_was_loaded(tmp_path, case):
    model, params, _ = loaded(tmp_path, case)
    again, same, _ = language.load(language.save(tmp_path / "out", model, params), tokenizer=False)
    assert again.config == model.config
    assert equal(params, same)
    # The files too: names, and what the model does not use.
    first, second = (files._safetensors(tmp_path / name) for name in (case, "out"))
    assert set(first) == set(second)
    assert all((first[name]() == second[name]()).all() for name in first)


def test_bfloat16_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 3000)
    model, params, _ = loaded(tmp_path, "gpt2", dtype=jnp.bfloat16)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    out = language.save(tmp_path / "out", model, params, words())
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(reference("gpt2")["shapes"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    _, same, tokenizer = language.load(out)
    assert equal(params, same)
    assert tokenizer.encode("a good film") == words().encode("a good film")
    tokens = jnp.array([tokenizer.encode("a good film")], jnp.int32)
    wide = apply(model, jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens)
    narrow = apply(model, params, tokens)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.05)


def test_files_of_older_versions(tmp_path):
    """Names without the base of the model, gamma and beta for the norms, constants that were stored as tensors."""
    from safetensors.numpy import save_file

    model, params, _ = loaded(tmp_path, "bert")
    tensors = {n: r() for n, r in files._safetensors(tmp_path / "bert").items()}
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for n, x in tensors.items()}  # fmt: skip
    old["bert.embeddings.position_ids"] = np.arange(24)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(old, tmp_path / "bert" / "model.safetensors")
    again, same, _ = language.load(tmp_path / "bert", tokenizer=False)
    assert equal(params, same)
    assert not again.rest
    assert again.config == model.config


def test_padding_changes_nothing(tmp_path):
    for case in ("qwen2", "roberta"):
        model, params, _ = loaded(tmp_path, case)
        tokens = jnp.array([[5, 7, 9, 11]], jnp.int32)
        short = apply(model, params, tokens)
        filled = jnp.concatenate([tokens, jnp.full((1, 6), 8, jnp.int32)], axis=1)
        long = apply(model, params, filled, jnp.arange(10)[None] < 4)
        np.testing.assert_allclose(long[:, :4], short, atol=1e-5)


def test_unused_tensors_are_kept(tmp_path):
    model, _, _ = loaded(tmp_path, "bert-bare")
    assert sorted(model.rest) == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "gpt2", "opt"])
def test_a_prefix_of_real_tokens_is_those_tokens(tmp_path, case):
    model, params, _ = loaded(tmp_path, case)
    before, tokens = jnp.array([4, 9, 3], jnp.int32), jnp.array([[5, 6, 7, 8], [9, 9, 1, 2]], jnp.int32)
    x, merge = trainable.prefix(model, params, KEY, tokens=before)
    whole = jnp.concatenate([jnp.broadcast_to(before, (2, 3)), tokens], axis=1)
    mask = jnp.array([[True] * 4, [True] * 3 + [False]])
    answer, expected = apply(model, merge(x), tokens, mask), apply(model, params, whole)[:, 3:]
    np.testing.assert_allclose(answer[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(answer[1, :3], expected[1, :3], atol=1e-5)
    assert trees.size(x) == 2 * model.config.layers * 3 * model.config.kv_heads * model.config.head_size
    with pytest.raises(ValueError, match="a prefix"):
        language.save(tmp_path / "out", model, merge(x))


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_prefix_is_written_as_peft_reads_it(tmp_path, case):
    """The tensor as PEFT takes it apart: (places, layers * 2, heads, size), keys and values in turn."""
    from safetensors.numpy import load_file

    model, params, _ = loaded(tmp_path, case)
    x, merge = trainable.prefix(model, params, KEY, length=3)
    folder = language.save_prefix(tmp_path / case / "prefix", model, x["prefix"])
    settings = json.loads((folder / "adapter_config.json").read_text())
    heads, size = settings["num_attention_heads"], settings["token_dim"] // settings["num_attention_heads"]
    rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    parts = rows.reshape(settings["num_virtual_tokens"], settings["num_layers"] * 2, heads, size).transpose(1, 0, 2, 3)
    np.testing.assert_array_equal(parts[::2], x["prefix"]["k"])
    np.testing.assert_array_equal(parts[1::2], x["prefix"]["v"])
    again = language.load_prefix(folder)
    np.testing.assert_array_equal(again["k"], x["prefix"]["k"])
    np.testing.assert_array_equal(again["v"], x["prefix"]["v"])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="PREFIX_TUNING, without projection\ngot LORA"):
        language.load_prefix(tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        language.load_prefix(tmp_path)
    with pytest.raises(FileExistsError, match="expected no folder at"):
        language.save_prefix(folder, model, x["prefix"])

    torch = pytest.importorskip("torch", reason="needs torch==2.13.0, which the default suite does without")
    peft = pytest.importorskip("peft", reason="needs peft, which the default suite does without")
    import transformers

    tokens = jnp.array([[5, 6, 7, 8], [9, 9, 1, 2]], jnp.int32)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        answer = theirs(input_ids=torch.tensor(np.asarray(tokens)).long()).logits.numpy()
    np.testing.assert_allclose(apply(model, merge(x), tokens), answer, atol=1e-4)


def test_lora(tmp_path):
    model, params, _ = loaded(tmp_path, "llama")
    x, merge = trainable.lora(params, KEY, rank=2, alpha=6.0, targets=("q", "v", "down"))
    assert trees.size(x) == 2 * 2 * (16 + 16 + 16 + 8 + 24 + 16)
    tokens = jnp.array([[5, 6, 7, 8]], jnp.int32)
    assert equal(apply(model, merge(x), tokens), apply(model, params, tokens))
    x = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), x)
    merged = merge(x)
    assert merged["embed"]["tokens"] is params["embed"]["tokens"]  # nothing is copied
    out = language.save(tmp_path / "out", model, merged)
    _, folded, _ = language.load(out, tokenizer=False)
    a, b = x["layers"]["down"]["lora"]["a"], x["layers"]["down"]["lora"]["b"]
    np.testing.assert_allclose(folded["layers"]["down"]["w"], params["layers"]["down"]["w"] + 3.0 * a @ b, atol=1e-6)
    np.testing.assert_allclose(apply(model, merged, tokens), apply(model, folded, tokens), atol=1e-5)
    assert not equal(apply(model, merged, tokens), apply(model, params, tokens))


def test_subsets(tmp_path):
    model, params, _ = loaded(tmp_path, "bert")
    x, merge = trainable.biases_and_norms(params)
    assert trees.size(x) == 2 * (4 * 16 + 24 + 16 + 4 * 16)  # q k v o, up, down; scale and shift of two norms
    assert equal(merge(x), params)
    moved = merge(jax.tree.map(lambda leaf: leaf + 1, x))
    assert equal(moved["layers"]["up"]["b"], params["layers"]["up"]["b"] + 1)
    assert moved["layers"]["up"]["w"] is params["layers"]["up"]["w"]
    x, merge = trainable.full(params)
    assert equal(merge(x), params)
    with pytest.raises(ValueError, match="at least one leaf to train"):
        trainable.subset(params, lambda path: path == "layers/query/w")
    with pytest.raises(ValueError, match="targets among q, k, v, o, up, down"):
        trainable.lora(params, KEY, targets=("q_proj",))
    with pytest.raises(ValueError, match="a rank between 1 and 16"):
        trainable.lora(params, KEY, rank=17)
    with pytest.raises(ValueError, match="a prefix of 1 to 23"):
        trainable.prefix(model, params, KEY, length=24)


# GGUF


def byte_level():
    """256 bytes, two merges and two special tokens, as the lists of a GGUF file."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", "<|user|>", *sorted(ByteLevel.alphabet()), "th", "the"]
    return tokens, ["t h", "th e"], [3, 4] + [1] * (len(tokens) - 2)


def write_gguf(path, kind="llama", quantization="F32", **extra):
    """A file as llama.cpp's converter makes it, and the parameters it means."""
    import gguf

    tokens, merges, types = byte_level()
    sizes = {"vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = language.tiny(kind, **sizes, num_key_value_heads=2, head_dim=32, rope_theta=100.0)
    draw = np.random.RandomState(0).standard_normal
    params = jax.tree.map(lambda s: (0.3 * draw(s.shape)).astype(np.float32), jax.eval_shape(model.init, KEY))
    writer = gguf.GGUFWriter(path, kind)
    c = model.config
    writer.add_block_count(c.layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_size)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, value in extra.items():
        writer.add_string(name.replace("_dot_", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_eos_token_id(0)
    kinds = gguf.GGMLQuantizationType
    theirs = {theirs: ours for ours, theirs in files.layouts.GGUF.items()}
    arrays = {}
    for name, _, read in saving._tensors_of(model, trees_by_path(params)):
        block = name.startswith("model.layers.")
        layer, rest = name.removeprefix("model.layers.").split(".", 1) if block else ("", name)
        base, suffix = rest.rsplit(".", 1)
        x = np.ascontiguousarray(read())
        arrays[name] = gguf.dequantize(gguf.quantize(x, kinds[quantization]), kinds[quantization]) if x.ndim == 2 else x
        which = theirs[base]
        if kind == "llama" and which in ("attn_q", "attn_k"):  # the two of a rotary pair side by side
            heads = c.heads if which == "attn_q" else c.kv_heads
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        data = gguf.quantize(x, kinds[quantization]) if x.ndim == 2 else x
        place = f"blk.{layer}." if block else ""
        writer.add_tensor(f"{place}{which}.{suffix}", data, raw_dtype=kinds[quantization] if x.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, arrays


def trees_by_path(params):
    return {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("llama", q) for q in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")] + [("qwen2", "F32"), ("qwen3", "Q8_0")],
)
def test_gguf(tmp_path, kind, quantization):
    original, arrays = write_gguf(tmp_path / "m.gguf", kind, quantization)
    model, params, tokenizer = language.load(tmp_path / "m.gguf")
    assert model.config == original.config
    got = {name: read() for name, _, read in saving._tensors_of(model, trees_by_path(params))}
    assert set(got) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    ids = tokenizer.encode("the 42<|user|>")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["the", "Ġ", "4", "2", "<|user|>"]
    out = language.save(tmp_path / "out", model, params, tokenizer)
    _, same, again = language.load(out)
    assert equal(params, same)
    assert again.encode("the 42<|user|>") == ids
    assert again.special["eos"] == 0


# Tokenizers


def test_tokenizers_of_older_folders(tmp_path):
    opt = write_folder(tmp_path / "opt", "opt", vocab_size=32, bos_token_id=1)
    letters = ["<pad>", "<s>", "</s>", "Ġ", "a", "b", "c", "ab", "Ġab"]
    (opt / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (opt / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    assert language.load(opt)[2].encode("ab ab") == [1, 7, 8]  # OPT's texts begin with its beginning of text
    assert language.load(opt)[2].encode("ab ab", special=False) == [7, 8]
    bert = write_folder(tmp_path / "bert", "bert")
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n")
    tokenizer = language.load(bert)[2]
    assert tokenizer.encode("A bc") == [2, 5, 6, 7, 3]
    assert tokenizer.decode([5, 6, 7]) == "a bc"
    assert tokenizer.special["pad"] == 0


def test_splitting_of_words():
    tokens, merges, types = byte_level()
    known = {"types": types, "special": {"eos": 0}}
    qwen = from_bpe(tokens, merges, kind="qwen2", **known)
    split = lambda t, text: [piece for piece, _ in t.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert split(qwen, "I'll 123") == ["I", "'ll", "Ġ", "1", "2", "3"]
    assert split(from_bpe(tokens, merges, kind="llama-bpe", **known), "I'll 1234") == ["I", "'ll", "Ġ", "123", "4"]
    assert split(from_bpe(tokens, merges, kind="gpt-2", **known), "I'll 1234") == ["I", "'ll", "Ġ1234"]
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre"):
        from_bpe(tokens, merges, kind="deepseek", **known)


# Bad files: three parts, and what is wrong by name


def refused(folder, expected, kind=ValueError, **options):
    with pytest.raises(kind, match=expected) as caught:
        language.load(folder, **options)
    assert str(caught.value).count("\n") == 2
    assert "usual cause" in str(caught.value)
    return str(caught.value)


def test_bad_folders(tmp_path):
    refused(tmp_path / "nowhere", "a Hugging Face folder or a GGUF file", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", FileNotFoundError)
    good = write_folder(tmp_path / "good", "llama", tokenizer=True)
    language.load(good)
    (good / "config.json").write_text("{")
    refused(good, "JSON in")
    write_folder(good, "llama", model_type="lama")
    assert "got 'lama'" in refused(good, "a model_type that is supported")
    write_folder(good, "llama", quantization_config={"bits": 4})
    refused(good, "weights that are not quantized")
    write_folder(good, "llama", hidden_act="maxout")
    refused(good, "an activation")
    write_folder(good, "llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    refused(good, "rotary positions of the kind")
    write_folder(good, "gpt2", scale_attn_by_inverse_layer_idx=True)
    refused(good, "scale_attn_by_inverse_layer_idx=False")
    found = reference("llama")["config"]
    (good / "config.json").write_text(json.dumps({k: v for k, v in found.items() if k != "hidden_size"}))
    refused(good, "'hidden_size' in the config.json of a llama model")


def test_bad_weights(tmp_path):
    from safetensors.numpy import save_file

    good = write_folder(tmp_path / "good", "llama", tokenizer=True)
    write_folder(good, "llama", num_hidden_layers=3)
    refused(good, r"the tensor 'model\.layers\.2")
    write_folder(good, "llama", vocab_size=40)
    refused(good, r"floats of shape \(40, 16\) from 'model.embed_tokens.weight'")
    write_folder(good, "llama")
    (good / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(good, "a safetensors file at")
    (good / "model.safetensors").rename(good / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(good, "'model.safetensors' in", FileNotFoundError)
    (good / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    refused(good, "'model-1-of-2.safetensors' in", FileNotFoundError)
    (good / "model.safetensors.index.json").unlink()
    shapes = reference("llama")["shapes"]
    save_file({n: np.zeros(s, np.int8) for n, s in shapes.items()}, good / "model.safetensors")
    refused(good, "floats of shape")


def test_bad_tokenizers(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    refused(folder, "tokenizer.json, vocab.json", FileNotFoundError)
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "a tokenizer in")
    words().save(folder)
    larger = json.loads((folder / "tokenizer.json").read_text())
    larger["model"]["vocab"]["more"] = 32
    (folder / "tokenizer.json").write_text(json.dumps(larger))
    assert "ids up to 32" in refused(folder, "a tokenizer for a model of 32 tokens")


def test_bad_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF no more")
    refused(tmp_path / "m.gguf", "a GGUF file at")
    write_gguf(tmp_path / "m.gguf", llama_dot_rope_dot_scaling_dot_type="yarn")
    refused(tmp_path / "m.gguf", "plain rotary positions")


def test_bad_saving(tmp_path):
    model, params, _ = loaded(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("\\bye")
    with pytest.raises(FileExistsError, match="no model at"):
        language.save(tmp_path / "out", model, params)
    x, _ = trainable.biases_and_norms(params)
    with pytest.raises(ValueError, match="the model's 12 leaves"):
        language.save(tmp_path / "new", model, x)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="to write"):
        language.save(tmp_path / "file" / "new", model, params)


def test_bad_lengths_and_heads():
    model = language.tiny("gpt2")
    params = model.init(KEY)
    with pytest.raises(ValueError, match="at most 24 tokens"):
        apply(model, params, jnp.zeros((1, 25), jnp.int32))
    x, merge = trainable.prefix(model, params, KEY, length=4)
    with pytest.raises(ValueError, match="a prefix of 4"):
        apply(model, merge(x), jnp.zeros((1, 21), jnp.int32))
    encoder = language.Model(configs.from_hf(language.tiny("bert").source), {})
    assert apply(encoder, encoder.init(KEY), jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 16)
    with pytest.raises(ValueError, match="a model with an output head"):
        encoder.logits(params, jnp.zeros((1, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_is_saved(tmp_path, case):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0, which the default suite does without")
    transformers = pytest.importorskip("transformers")
    model, params, _ = loaded(tmp_path, case)
    params = jax.tree.map(lambda x: x + 0.01, params)  # as after training
    out = language.save(tmp_path / "out", model, params)
    cls = getattr(transformers, maker().CASES[case][0])
    theirs, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokens, mask = inputs(reference(case))
    with torch.no_grad():
        answer = theirs.eval()(torch.tensor(np.asarray(tokens)), attention_mask=torch.tensor(np.asarray(mask)).long())
    answer = (answer.logits if hasattr(answer, "logits") else answer.last_hidden_state).numpy()
    ours = apply(model, params, tokens, mask)
    np.testing.assert_allclose(np.where(mask[..., None], ours, 0), np.where(mask[..., None], answer, 0), atol=5e-6)


def test_gguf_keeps_the_format_of_the_chat(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    write_gguf(tmp_path / "m.gguf", tokenizer_dot_chat_template=template)
    model, params, tokenizer = language.load(tmp_path / "m.gguf")
    out = language.save(tmp_path / "out", model, params, tokenizer)
    assert (out / "chat_template.jinja").read_text() == template
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert (out / "tokenizer.json").exists()


def test_a_model_is_named_by_its_own_name(tmp_path):
    for kind in ("mixtral", "qwen2_moe", "modernbert", "deberta-v2"):
        folder = write_folder(tmp_path / kind, "llama", model_type=kind)
        said = refused(folder, "a model_type that is supported", tokenizer=False)
        assert "is it" not in str(said)
