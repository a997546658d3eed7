# SPDX-License-Identifier: Apache-2.0
"""Text that a decoder writes does not depend on how it remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.models.decoder import Decoder
from attnjax.nn.generation import beam_search, generate, reader, rereader, write
from attnjax.ops.cache import FullCache, PagedCache, WindowCache
from attnjax.parallel import make_mesh

LENGTHS = np.array([7, 3, 5], np.int32)
COUNT = 6


@pytest.fixture(scope="module")
def network():
    model = Decoder(vocab_size=50, width=32, heads=(4, 2), hidden=48)
    prompt = np.random.default_rng(0).integers(0, 50, (3, 7)).astype(np.int32)
    params = model.init(jax.random.key(0), prompt)["params"]
    # Sharper than at the start, so that rounding never decides between tokens.
    params = jax.tree.map(lambda x: 3 * x, params)
    return model, params, prompt


def layers(cache):
    return jax.tree.map(lambda x: jnp.repeat(x[None], 2, axis=0), cache)


def sizes(**more):
    return {"batch": 3, "heads": 2, "width": 8, **more}


CACHES = {
    "full": lambda: FullCache.empty(**sizes(capacity=13)),
    "ring": lambda: WindowCache.empty(**sizes(window=13, chunk=7)),
    "paged": lambda: PagedCache.empty(**sizes(pages=12, page_size=4, max_pages_per_sequence=4)),
}


@pytest.fixture(scope="module")
def reread(network):
    """What is written without any cache, one prompt at a time."""
    model, params, prompt = network
    rows = []
    for row, length in zip(prompt, LENGTHS, strict=True):
        step, state = rereader(model, params, 1, 13)
        rows.append(generate(step, state, row[None, :length], COUNT))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", CACHES)
def test_caches_write_what_no_cache_writes(network, reread, name):
    model, params, prompt = network
    prefill, step, _ = reader(model, params)
    cache = layers(CACHES[name]())
    ours = jax.jit(
        lambda cache: generate(step, cache, prompt, COUNT, lengths=LENGTHS, prefill=prefill)
    )(cache)
    np.testing.assert_array_equal(ours, reread)
    assert len(np.unique(reread)) > 5


def test_writing_over_devices_is_the_same(network, reread):
    model, params, prompt = network
    many, lengths = np.repeat(prompt[:2], 2, axis=0), np.repeat(LENGTHS[:2], 2)
    with jax.set_mesh(make_mesh({"data": 4, "fsdp": 1, "model": 2, "context": 1})):
        ours = jax.jit(lambda p, x: write(model, p, x, COUNT, lengths=lengths))(params, many)
    np.testing.assert_array_equal(ours, np.repeat(reread[:2], 2, axis=0))


@pytest.mark.slow
def test_beams_of_a_decoder_are_at_least_as_likely_as_greed(network):
    model, params, prompt = network
    _, step, reorder = reader(model, params)
    cache = model.empty_cache(3 * 4, capacity=13)
    written, scores = jax.jit(
        lambda cache: beam_search(step, cache, prompt, COUNT, beams=4, reorder=reorder)
    )(cache)
    greedy = write(model, params, prompt, COUNT)

    def likelihood(tokens):
        texts = np.concatenate([prompt, tokens], axis=1)
        log = jax.nn.log_softmax(model.apply({"params": params}, texts).logits)[:, 6:-1]
        return np.take_along_axis(np.asarray(log), np.asarray(tokens)[..., None], axis=-1).sum(
            (1, 2)
        )

    np.testing.assert_allclose(scores[:, 0], likelihood(np.asarray(written[:, 0])), rtol=1e-4)
    assert (scores[:, 0] >= likelihood(np.asarray(greedy)) - 1e-4).all()
