# SPDX-License-Identifier: Apache-2.0
"""Every name a recipe may use, and where it lives: explicit, lazy, one line each.

Nothing is imported until `resolve` is called, so listing the systems costs nothing. Names are
looked up in these tables only; a recipe can never name an import path.
"""

import dataclasses
import difflib
import importlib
from typing import Any

from attnjax.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class System:
    """One published system: its kind (`model`, `method`, `analysis`, `benchmark`) and its home."""

    slug: str
    kind: str
    title: str
    target: str

    @property
    def module(self) -> str:
        """Dotted path of the file that holds PAPER and PRESETS."""
        return self.target.partition(":")[0]


SYSTEMS = {
    system.slug: system
    for system in (
        System(
            "cab",
            "benchmark",
            "CAB: nine efficient attentions, four patterns, seven tasks, one index",
            "attnjax.benchmarks.cab.index:score",
        ),
        System(
            "crossvit",
            "model",
            "CrossViT: dual-branch vision transformer with cross-attention fusion",
            "attnjax.models.crossvit:CrossViT",
        ),
        System(
            "deconstructing_attention",
            "model",
            "Deconstructing attention: decoders with one principle of attention given up",
            "attnjax.models.deconstructing_attention:RelaxedDecoder",
        ),
        System(
            "icl_linear_regression",
            "analysis",
            "In-context linear regression: circuits and dynamics of multi-head softmax attention",
            "attnjax.analysis.icl_linear_regression.measures:circuits_report",
        ),
        System(
            "landmark",
            "model",
            "Landmark attention: blocks of tokens retrieved through trained landmarks",
            "attnjax.models.landmark:Landmark",
        ),
        System(
            "long_context_bench",
            "benchmark",
            "LongCA-bench: masks x kernels x context-parallel attentions",
            "attnjax.benchmarks.long_context.grid:Grid",
        ),
        System(
            "moh",
            "model",
            "MoH: attention heads as experts, in ViT, DiT and decoders",
            "attnjax.models.moh:MixtureOfHeadViT",
        ),
        System(
            "unified_long_sequence",
            "benchmark",
            "Unified view of long-sequence models: token mixers, context sweeps, speed and memory",
            "attnjax.benchmarks.long_sequence:run",
        ),
    )
}

BACKBONES = {
    "decoder": "attnjax.models.decoder:Decoder",
    "dit": "attnjax.models.dit:DiT",
    "encoder": "attnjax.models.encoder:Encoder",
    "encoder_decoder": "attnjax.models.encoder_decoder:EncoderDecoder",
    "gpt2": "attnjax.models.gpt2:GPT2",
    "vit": "attnjax.models.vit:ViT",
}
"""Networks that systems and recipes start from; no system of their own."""

MODELS = {
    "fastspeech2": "attnjax.models.fastspeech2:FastSpeech2",
    "informer": "attnjax.models.informer:Informer",
    "pointr": "attnjax.models.pointr:PoinTr",
    "regression_attention": "attnjax.models.regression_attention:RegressionAttention",
    "sequence_mixer": "attnjax.models.sequence_mixer:SequenceMixer",
    "sr3": "attnjax.models.sr3:SR3",
    "transformer_tts": "attnjax.models.transformer_tts:TransformerTTS",
}
"""Models that belong to a system of another kind."""

TASKS = {
    "class_diffusion": "attnjax.tasks.class_diffusion:ClassDiffusion",
    "classification": "attnjax.tasks.classification:Classification",
    "completion": "attnjax.tasks.completion:Completion",
    "forecasting": "attnjax.tasks.forecasting:Forecasting",
    "language": "attnjax.tasks.language:LanguageModelling",
    "long_language": "attnjax.tasks.long_language:LongLanguageModelling",
    "masked_language": "attnjax.tasks.masked_language:MaskedLanguageModelling",
    "next_token": "attnjax.tasks.sequence:NextToken",
    "parallel_speech": "attnjax.tasks.speech:ParallelSpeech",
    "position_regression": "attnjax.tasks.sequence:PositionRegression",
    "prompt_regression": "attnjax.tasks.prompt_regression:PromptRegression",
    "sequence_to_sequence": "attnjax.tasks.sequence_to_sequence:SequenceToSequence",
    "stepwise_speech": "attnjax.tasks.speech:StepwiseSpeech",
    "super_resolution": "attnjax.tasks.super_resolution:SuperResolution",
}

SOURCES = {
    "associative_recall": "attnjax.data.patterns:AssociativeRecall",
    "copy_back": "attnjax.data.patterns:CopyBack",
    "copy_sort": "attnjax.data.pairs:CopySort",
    "digit_pairs": "attnjax.data.pictures:DigitPairs",
    "digit_sequences": "attnjax.data.lra:DigitSequences",
    "digits": "attnjax.data.sources:Digits",
    "image_folder": "attnjax.data.sources:ImageFolder",
    "induction": "attnjax.data.patterns:Induction",
    "information_exchange": "attnjax.data.synthetic:InformationExchange",
    "information_exchange_images": "attnjax.data.synthetic:InformationExchangeImages",
    "json_lines": "attnjax.data.token_files:JsonLines",
    "key_recall": "attnjax.data.patterns:KeyRecall",
    "lagged_series": "attnjax.data.series:LaggedSeries",
    "latent_files": "attnjax.data.latents:LatentFiles",
    "listops": "attnjax.data.sequences:ListOps",
    "lj_speech": "attnjax.data.speech:LjSpeech",
    "lra_image": "attnjax.data.lra:LraImage",
    "lra_listops": "attnjax.data.lra:LraListOps",
    "lra_pathfinder": "attnjax.data.lra:LraPathfinder",
    "lra_retrieval": "attnjax.data.lra:LraRetrieval",
    "lra_text": "attnjax.data.lra:LraText",
    "markov_text": "attnjax.data.text:MarkovText",
    "moving_average": "attnjax.data.sequences:MovingAverage",
    "multi_news": "attnjax.data.pairs:MultiNews",
    "needle": "attnjax.data.sequences:Needle",
    "packed_tokens": "attnjax.data.token_files:PackedTokens",
    "parametric_shapes": "attnjax.data.points:ParametricShapes",
    "pass_key": "attnjax.data.pass_key:PassKey",
    "pathfinder": "attnjax.data.sequences:Pathfinder",
    "pcn": "attnjax.data.points:Pcn",
    "photo_pairs": "attnjax.data.pictures:PhotoPairs",
    "picture_folders": "attnjax.data.pictures:PictureFolders",
    "prefix_count": "attnjax.data.patterns:PrefixCount",
    "regression_prompts": "attnjax.data.regression:RegressionPrompts",
    "seasonal_series": "attnjax.data.series:SeasonalSeries",
    "series_file": "attnjax.data.series:SeriesFile",
    "stdlib_source": "attnjax.data.text:StandardLibrarySource",
    "stdlib_text": "attnjax.data.text:StandardLibraryText",
    "synthetic_images": "attnjax.data.synthetic:SyntheticImages",
    "synthetic_speech": "attnjax.data.speech:SyntheticSpeech",
    "text_bytes": "attnjax.data.lra:TextBytes",
    "text_files": "attnjax.data.text:TextFiles",
    "text_pairs": "attnjax.data.pairs:TextPairs",
    "tfds": "attnjax.data.sources:TensorFlowDatasets",
    "window_permutation": "attnjax.data.patterns:WindowPermutation",
}

PIPELINES = {
    "arrays": "attnjax.data.pipelines:Arrays",
    "image_eval": "attnjax.data.pipelines:ImageEval",
    "image_train": "attnjax.data.pipelines:ImageTrain",
    "mask_tokens": "attnjax.data.masking:MaskTokens",
    "picture_pairs": "attnjax.data.pictures:PicturePairs",
    "pictures": "attnjax.data.pictures:Pictures",
    "point_clouds": "attnjax.data.points:PointClouds",
    "small_images": "attnjax.data.pipelines:SmallImages",
}

MEASUREMENTS = {
    "placement_balance": "attnjax.benchmarks.long_context.claim:PlacementBalance",
}

TABLES = {
    "model": {
        **{slug: system.target for slug, system in SYSTEMS.items() if system.kind == "model"},
        **BACKBONES,
        **MODELS,
    },
    "task": TASKS,
    "source": SOURCES,
    "pipeline": PIPELINES,
    "measurement": MEASUREMENTS,
}


def nearest(name: str, names) -> str:
    """Say which known name the user probably meant, and list all of them.

    Args:
      name: the unknown name.
      names: the valid choices.

    Returns:
      A sentence fragment such as "did you mean 'steps'? (known: batch, seed, steps)".
    """
    known = sorted(map(str, names))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    listing = f"(known: {', '.join(known)})" if known else "(none is known)"
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def resolve(table: str, name: str) -> Any:
    """Import and return the class registered under a name.

    Args:
      table: one of `TABLES` (`model`, `task`, `source`, `pipeline`, `measurement`).
      name: a registered name.

    Returns:
      The registered class.

    Raises:
      RecipeError: the name is not registered; the message lists the known ones.
    """
    module, _, attribute = _target(table, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def home(slug: str) -> Any:
    """Import and return the module of a registered model, with its PRESETS and TORCH_NAMES.

    Raises:
      RecipeError: no such model is registered; the message lists the known ones.
    """
    return importlib.import_module(_target("model", slug).partition(":")[0])


def _target(table, name):
    entries = TABLES[table]
    if name not in entries:
        raise RecipeError(f"unknown {table} {name!r}: {nearest(name, entries)}")
    return entries[name]


def system(slug: str) -> System:
    """Return the registered system of a slug, or raise RecipeError with the nearest known one."""
    if slug not in SYSTEMS:
        raise RecipeError(f"unknown system {slug!r}: {nearest(slug, SYSTEMS)}")
    return SYSTEMS[slug]
