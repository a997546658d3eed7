# SPDX-License-Identifier: Apache-2.0
"""ROUGE of summaries, by the library rouge-score, which is imported when it is needed.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004: F-measure of common words
(ROUGE-1), pairs of words (ROUGE-2) and the longest common subsequence (ROUGE-L).
"""

from collections.abc import Sequence

import numpy as np

from attnjax.errors import AttnjaxError

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, stemming: bool = True
) -> dict[str, float]:
    """Return the mean F-measures of summaries.

    Args:
      predictions: texts that were written.
      references: what should have been, in the same order.
      stemming: compare the stems of words.

    Returns:
      `rouge1`, `rouge2`, `rougeL` in per cent, as tables have them.

    Raises:
      ValueError: there are none, or not as many of both.
      AttnjaxError: the library is not installed.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: must be as many, "
            "and at least one"
        )
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise AttnjaxError(
            "ROUGE needs the library rouge-score: pip install 'attnjax[text]'"
        ) from error
    scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=stemming)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: 100 * float(np.mean([s[kind].fmeasure for s in scores])) for kind in KINDS}
