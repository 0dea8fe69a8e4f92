"""Language models as objectives: files to JAX and back, tasks, and what of a model is trained.

`load` reads a Hugging Face folder or a GGUF file, `save` writes a folder that `transformers` reads. `data` turns JSON
lines into arrays, `trainable` says which parameters are searched, `tasks.Task` is the objective. Importing this package
imports neither safetensors nor tokenizers nor gguf: `load` and `save` need them, and the extra `llm` has them.

>>> import jax
>>> model = tiny()
>>> x, merge = trainable.biases_and_norms(model.init(jax.random.key(0)))
>>> sorted(x["layers"])
['attention_norm', 'mlp_norm']
"""

from evoopt.envs.language import data, tasks, trainable
from evoopt.envs.language.config import Config
from evoopt.envs.language.files import load, load_prefix
from evoopt.envs.language.model import Model, tiny
from evoopt.envs.language.saving import save, save_prefix
from evoopt.envs.language.tasks import Task
from evoopt.envs.language.tokenizer import Tokenizer

__all__ = [
    "Config", "Model", "Task", "Tokenizer", "data", "load", "load_prefix", "save", "save_prefix", "tasks", "tiny",
    "trainable",
]  # fmt: skip
