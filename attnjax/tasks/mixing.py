# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix over a whole batch, inside the jitted step.

Example i is mixed with example `b - 1 - i` of the global batch; one share and one box are drawn for
the batch. Both are pure functions of the key, so the result does not depend on how the batch is
sharded.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412
    Yun et al., "CutMix", arXiv 1905.04899
"""

import jax
import jax.numpy as jnp

from attnjax.typing import Array, PRNGKey


def cut_box(key: PRNGKey, height: int, width: int, share: Array) -> Array:
    """Draw a box of area `1 - share` of the image, cut off at the image's border.

    Args:
      key: typed key.
      height: rows of the image.
      width: columns of the image.
      share: scalar in `[0, 1]`: the part of the image that should remain.

    Returns:
      `[y, x]` booleans, True inside the box. Its centre is uniform over the pixels, so the clipped
      box can be smaller than asked: correct the share by the mean of this mask.
    """
    rows_key, columns_key = jax.random.split(key)
    ratio = jnp.sqrt(1.0 - share)

    def inside(key, size):
        half = jnp.floor(size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        position = jnp.arange(size)
        return (position >= centre - half) & (position < centre + half)

    return inside(rows_key, height)[:, None] & inside(columns_key, width)[None, :]


def blend(images: Array, targets: Array, own: Array) -> tuple[Array, Array]:
    """Mix each example with its mirror image in the batch.

    `image_i = own * image_i + (1 - own) * image_(b-1-i)`, and targets with the mean of `own`.

    Args:
      images: `[b, y, x, c]` floats.
      targets: `[b, v]` probabilities.
      own: `[y, x]` float32 weights of an example's own pixels: constant for mixup, 0 or 1 for
        CutMix.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    weight = own[None, :, :, None]
    mixed = images.astype(jnp.float32) * weight + images[::-1].astype(jnp.float32) * (1 - weight)
    share = jnp.mean(own)
    return mixed.astype(images.dtype), targets * share + targets[::-1] * (1 - share)


def mix(
    key: PRNGKey,
    images: Array,
    targets: Array,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> tuple[Array, Array]:
    """Apply mixup or CutMix to a batch; both off leaves it alone.

    The share of an example's own image is drawn from Beta(a, a) with a the strength of whichever
    of the two was chosen.

    Args:
      key: typed key of this step.
      images: `[b, y, x, c]` floats.
      targets: `[b, v]` probabilities.
      mixup: Beta parameter of mixup; 0 switches it off.
      cutmix: Beta parameter of CutMix; 0 switches it off.
      probability: chance that a batch is mixed at all.
      switch_probability: chance of CutMix where both are on.

    Returns:
      Images and targets of the same shapes and dtypes.

    Raises:
      ValueError: images are not of rank 4, or the batch sizes differ.
    """
    if images.ndim != 4 or targets.ndim != 2 or images.shape[0] != targets.shape[0]:
        raise ValueError(
            f"images {images.shape} and targets {targets.shape} are not [b, y, x, c] and [b, v]"
        )
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    height, width = images.shape[1:3]
    share_key, box_key, switch_key, apply_key = jax.random.split(key, 4)
    if mixup > 0 and cutmix > 0:
        cuts = jax.random.bernoulli(switch_key, switch_probability)
    else:
        cuts = jnp.asarray(cutmix > 0)
    # One draw for either: the rejection sampler behind Beta is slow to compile.
    strength = jnp.where(cuts, cutmix, mixup)
    share = jax.random.beta(share_key, strength, strength, dtype=jnp.float32)
    kept = 1.0 - cut_box(box_key, height, width, share).astype(jnp.float32)
    own = jnp.where(cuts, kept, share)
    own = jnp.where(jax.random.bernoulli(apply_key, probability), own, jnp.ones_like(own))
    return blend(images, targets, own)
