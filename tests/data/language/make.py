"""Writes the references beside this file: what transformers answers for tiny models with weights anybody can draw.

Needs torch and transformers; `tests/test_language_models.py` reads the files without them. Run it again only to add a
case: `python tests/data/language/make.py`.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPT = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_dim": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}  # fmt: skip
CASES = {  # name: (class, config class, config)
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 3}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 16}),
    "opt-postnorm": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert-bare": ("BertModel", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**SIZES, "type_vocab_size": 1}),
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the tensor `name`: RandomState's stream is frozen, so they are the same everywhere."""
    return (0.3 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import load_file

    tokens = np.random.RandomState(0).randint(3, 32, (2, 9))
    lengths = [9, 6]
    mask = np.arange(9)[None] < np.array(lengths)[:, None]
    for case, (cls, config, options) in CASES.items():
        model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes = {name: list(x.shape) for name, x in load_file(Path(folder) / "model.safetensors").items()}
            source = json.loads((Path(folder) / "config.json").read_text())
        state = {name: torch.tensor(weight(name, tuple(shape))) for name, shape in shapes.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        model.tie_weights()
        with torch.no_grad():
            out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
        answer = (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()
        rows = [
            [[float(f"{x:.7g}") for x in place] for place in row[:n]] for row, n in zip(answer, lengths, strict=True)
        ]
        found = {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "config": source, "shapes": shapes, "tokens": tokens.tolist(), "lengths": lengths, "answer": rows,
        }  # fmt: skip
        print(case, "missing (tied):", missing, "largest answer", np.abs(answer).max())
        (Path(__file__).parent / f"{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
