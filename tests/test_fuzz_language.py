"""Whatever bytes a model's files have, they are read, or refused in three parts: 300 damaged copies of each format."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutations import answered_or_refused, json_mutations, mutations
from test_language_models import write_gguf
from tiny_language import write_folder

from evoopt.envs import language
from evoopt.envs.language import config as configs
from evoopt.envs.language import files, gguf, tokenizer

WHOLE = ("llama", "gpt2", "bert", "qwen2", "mistral")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("fuzz") / "model", "llama", tokenizer=True)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(path, **options):
    return answered_or_refused(lambda: language.load(path, **options))


def outcomes(file, damaged, read):
    """How often it was read; every answer is a value, every refusal has three parts."""
    found = []
    for data in damaged:
        file.write_bytes(data)
        found.append(answered_or_refused(read) is not None)
    return found


def numpy_only(monkeypatch):
    """Leaves stay in NumPy: what is tested reads files, and a copy to a device is the dearest part."""
    monkeypatch.setattr(files, "jnp", type("jnp", (), {"asarray": np.asarray, "issubdtype": jnp.issubdtype,
                                                       "floating": jnp.floating}))  # fmt: skip


def test_damaged_weights(folder, monkeypatch):
    numpy_only(monkeypatch)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    read = outcomes(file, mutations(whole, 1), lambda: language.load(folder, tokenizer=False))
    assert 0 < sum(read) < 150


def test_a_forged_header_of_weights(folder, monkeypatch):
    numpy_only(monkeypatch)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    forged = (struct.pack("<Q", len(h)) + h + whole[8 + n :] for h in json_mutations(whole[8 : 8 + n], 2))
    read = outcomes(file, forged, lambda: language.load(folder, tokenizer=False))
    assert 0 < sum(read) < 150


def test_a_damaged_tokenizer(folder):
    file, found = folder / "tokenizer.json", json.loads((folder / "config.json").read_bytes())

    def read():
        made = tokenizer.from_folder(folder, found)
        tokenizer.check(made, 32)
        made.encode("a good film [MASK]")
        return made

    whole = file.read_bytes()
    both = (*mutations(whole, 3, 150), *json_mutations(whole, 4, 150))
    assert 0 < sum(outcomes(file, both, read)) < 250
    file.write_bytes(whole)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        text = (folder / "tokenizer_config.json").read_bytes()
        assert sum(outcomes(folder / name, (*mutations(text, 5, 20), *json_mutations(text, 6, 20)), read)) > 10


@pytest.mark.parametrize("case", WHOLE)
def test_a_damaged_config(case):
    """Whatever is read as a configuration is one that can be written down: nothing is made of its numbers."""
    sizes = {"sliding_window": 5} if case == "mistral" else {}
    sizes |= {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5} if case == "qwen2" else {}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16, "rope_theta": 1e4}  # fmt: skip
    sizes |= {"rope_parameters": scaling} if case == "llama" else {}
    text = json.dumps(language.tiny(case, **sizes).source)
    read = 0
    for data in json_mutations(text, 7, 300):
        try:
            found = files.document(data)
        except ValueError:
            continue
        if isinstance(found, dict):
            config = answered_or_refused(lambda found=found: configs.from_hf(found, masked_head=False))
            read += config is not None
            if config is not None:
                hash(config)
                assert len(config.frequencies) <= 1 << 15
                assert len(config.windows) <= configs.LAYERS
    assert read > 30


def test_a_config_that_belongs_to_other_weights(folder, monkeypatch):
    numpy_only(monkeypatch)
    file = folder / "config.json"
    whole = file.read_bytes()
    both = (*mutations(whole, 8, 60), *json_mutations(whole, 9, 60))
    assert sum(outcomes(file, both, lambda: language.load(folder, tokenizer=False))) > 5


@pytest.mark.parametrize(("name", "value"), [
    ("num_hidden_layers", 10**7), ("num_hidden_layers", 10**11), ("num_hidden_layers", 9_999), ("num_hidden_layers", 1),
    ("head_dim", 10**11), ("vocab_size", 10**12), ("num_attention_heads", 0), ("num_key_value_heads", 3),
    ("num_hidden_layers", -1), ("num_hidden_layers", "2"), ("num_hidden_layers", True), ("rms_norm_eps", 0),
])  # fmt: skip
def test_numbers_that_no_model_has(folder, name, value):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), name: value}))
    assert load(folder, tokenizer=False) is None


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "\0", 3])
def test_an_index_names_files_of_its_folder(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert load(folder, tokenizer=False) is None


def test_links_lead_into_the_hubs_blobs_only(folder, tmp_path):
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (folder / "generation_config.json").symlink_to(secret)  # it would be written beside the tuned model
    assert load(folder) is None
    (folder / "generation_config.json").unlink()
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, hub / "blobs" / f"x-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/x-{file.name}")
    assert load(snapshot) is not None


def test_a_damaged_gguf(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, tokenizer_dot_chat_template="{{ x }}")
    whole = file.read_bytes()
    head = whole[:12_000]
    read = outcomes(file, (data + whole[12_000:] for data in mutations(head, 10, 250)), lambda: gguf.read(file))
    read += outcomes(file, mutations(whole, 11, 50), lambda: gguf.read(file))
    assert 0 < sum(read) < 250
    at = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for count in (2**62, 10**7, 10**5):  # more values than the file has bytes: the library would go on for ever
        file.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
        with pytest.raises(ValueError, match="a GGUF file at"):
            gguf.read(file)


def test_a_panic_of_the_tokenizers_library_is_an_error(monkeypatch, folder):
    PanicException = type("PanicException", (BaseException,), {})
    import tokenizers

    class Panics:
        @staticmethod
        def from_str(text):
            raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    assert load(folder) is None


def test_a_reader_of_prefixes_takes_any_bytes(tmp_path):
    model = language.tiny()
    params = model.init(jax.random.key(0))
    x, _ = language.trainable.prefix(model, params, jax.random.key(1), length=2)
    folder = language.save_prefix(tmp_path / "p", model, x["prefix"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (folder / name).read_bytes()
        both = (*mutations(whole, 12, 60), *(json_mutations(whole, 13, 60) if name.endswith(".json") else ()))
        outcomes(folder / name, both, lambda: language.load_prefix(folder))
        (folder / name).write_bytes(whole)
    assert language.load_prefix(folder)["k"].shape == x["prefix"]["k"].shape
