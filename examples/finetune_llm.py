"""Fine-tune a language model without backpropagation, in the memory of inference: `evoopt finetune` from Python.

    python examples/finetune_llm.py MODEL train.jsonl held-out.jsonl OUT

MODEL is a Hugging Face folder or a GGUF file, the rows are {"prompt": "...", "completion": "..."}. OUT becomes a folder
that `transformers` loads, with a trajectory beside it: a few bytes a step that give the same weights again.
"""

import sys
from pathlib import Path

from evoopt.envs import language
from evoopt.recipes.finetune import finetune, lowest_loss
from evoopt.run import trajectory
from evoopt.strategies import mezo

base, train, held_out, out = map(Path, sys.argv[1:5])
model, params, tokenizer = language.load(base)
read = lambda path: language.data.completion(model, tokenizer, language.data.read(path))

x, merge = language.trainable.full(params)  # or biases_and_norms(params), lora(params, key), prefix(model, params, key)
task = language.Task(model, read(train), merge, batch_size=8)
strategy = mezo(sigma=1e-3, learning_rate=1e-6)
tuned = finetune(
    task, x, strategy, key=0, held_out=read(held_out), every=100, score=lowest_loss, generations=200, progress=True
)

for row in tuned.evaluations:
    print(f"after {row['generation']} steps: held-out loss {row['loss']:.4f}")
language.save(out, model, merge(tuned.params), tokenizer)
assert tuned.trajectory is not None  # MeZO is zeroth-order: values are all that it was told
path = trajectory.write(out / "run.trajectory", tuned.trajectory)
print(f"{out}: the weights after {tuned.generation} steps; {path}: {path.stat().st_size} bytes for the same")
trajectory.replay(trajectory.read(path), strategy, x)  # the same weights; raises where a bit differs
