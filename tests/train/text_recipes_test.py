# SPDX-License-Identifier: Apache-2.0
"""CAB's text recipes through the trainer: two steps of smaller models, and what is reported."""

import json
import math

import jax
import pytest

from attnjax import recipe
from attnjax.errors import RecipeError
from attnjax.parallel import make_mesh
from attnjax.train.loop import run
from attnjax.train.program import build
from attnjax.train.summaries import score_summaries, write_texts

SLOW = pytest.mark.slow
TINY = {"width": 16, "num_heads": 2, "hidden": 32}


def shrink(name, tmp_path):
    """The recipe with fewer and shorter examples and a smaller model."""
    shrunk = recipe.load(f"configs/cab/{name}.py" + (":pairs" if name == "summarization" else ""))
    shrunk.steps, shrunk.batch = 2, 4
    shrunk.checkpoint.every, shrunk.report.every = 2, 1
    shrunk.optim.warmup, shrunk.optim.accumulate = 1, 1
    shrunk.report.tensorboard = False
    shrunk.model |= TINY
    sections = [shrunk.data, *(evaluation.data for evaluation in shrunk.evals.values())]
    if name == "summarization":
        pair = json.dumps({"document": "many words " * 3, "summary": "words"})
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(f"{pair}\n" * 4)
        shrunk.model |= {"vocab_size": 260, "lengths": (24, 8), "depth": (1, 1)}
        shrunk.task |= {"shortest": 2, "longest": 8}
        for section in sections:
            section.source |= {"root": str(tmp_path), "lengths": (24, 8)}
    elif name == "copy_sort":
        shrunk.model |= {"depth": (1, 1)}
        sections[1].source["size"] = 8
    else:
        shrunk.model |= {"depth": 1}
        for evaluation in shrunk.evals.values():
            evaluation.batch = 128
    return shrunk.validate()


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("masked_language_model", ("validation/perplexity", "validation/accuracy")),
        pytest.param("language_model", ("test/perplexity", "test/bits_per_byte"), marks=SLOW),
        pytest.param("summarization", ("test/perplexity", "test/exact_match"), marks=SLOW),
        pytest.param("copy_sort", ("test/accuracy", "test/exact_match"), marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_steps(name, metrics, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])
    )
    result = run(shrink(name, tmp_path), str(tmp_path / "run"))
    assert result.step == 2
    assert all(math.isfinite(result.metrics[metric]) for metric in metrics)


@SLOW
def test_what_is_written_is_compared_with_what_should_be(tmp_path):
    shrunk = shrink("summarization", tmp_path)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    program = build(shrunk, mesh)
    compare = lambda written, references: {"pairs": len(written), "first": references[0]}
    with jax.set_mesh(mesh):
        params = program.init().averaged
        arguments = (program, params, shrunk.evals["test"])
        assert score_summaries(*arguments, score=compare) == {"pairs": 4, "first": "words"}
        written, _ = write_texts(*arguments, limit=3)
    assert len(written) == 3 and all(isinstance(text, str) for text in written)
    shrunk.evals["test"].data.source["name"] = "copy_sort"
    with pytest.raises(RecipeError, match="no texts to compare"):
        score_summaries(program, params, shrunk.evals["test"])
