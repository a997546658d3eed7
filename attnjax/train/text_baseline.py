# SPDX-License-Identifier: Apache-2.0
"""N-gram baselines of language recipes, counted on the text that a network is trained on."""

from attnjax.benchmarks.ngram import NGram
from attnjax.data.iterator import build
from attnjax.errors import RecipeError
from attnjax.recipe import Recipe


def ngram_bits(recipe: Recipe, order: int) -> dict[str, float]:
    """Return bits per token of a Kneser-Ney n-gram on every evaluation of a recipe.

    It is told more than a network: its contexts reach over the borders of texts.

    Args:
      recipe: whose sources have `documents()` and `vocab_size`, such as `stdlib_source`.
      order: n.

    Raises:
      RecipeError: a source has no documents, or the order does not fit its vocabulary.
    """
    sources = {"data": recipe.data, **{name: e.data for name, e in recipe.evals.items()}}
    documents = {}
    for name, data in sources.items():
        source, _ = build(data)
        if not hasattr(source, "documents"):
            raise RecipeError(
                f"{name}: source {data.source['name']!r} has no documents to count n-grams in"
            )
        documents[name], size = source.documents(), source.vocab_size
    try:
        model = NGram(documents.pop("data"), order, size)
    except ValueError as error:
        raise RecipeError(f"--ngram={order}: {error}") from error
    return {name: model.bits_per_token(found) for name, found in documents.items()}
