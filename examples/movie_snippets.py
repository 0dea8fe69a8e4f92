"""Put a small pretrained encoder and rated movie-review snippets into a folder, as `evoopt finetune` reads them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from evoopt.envs.language import bundled

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "movie-snippets")
folder.mkdir(parents=True)
shutil.copytree(bundled.minilm(), folder / "model")
rows = bundled.snippets(words=12)
rows = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
for name, part in (("train", rows[:1024]), ("held-out", rows[1024:])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    print(f"{folder / name}.jsonl: {len(part)} snippets")
