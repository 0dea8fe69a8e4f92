"""Language models as objectives: files to JAX and back, tasks, and what of a model is trained.

`load` reads a Hugging Face folder or a GGUF file, `save` writes a folder that `transformers` reads. Importing this
package imports neither safetensors nor tokenizers nor gguf: they are needed by `load` and `save`, and are in the extra
`llm`.
"""

from evoopt.envs.language.config import Config
from evoopt.envs.language.files import load, save
from evoopt.envs.language.model import Model
from evoopt.envs.language.tokenizer import Tokenizer

__all__ = ["Config", "Model", "Tokenizer", "load", "save"]
