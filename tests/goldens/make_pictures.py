# SPDX-License-Identifier: Apache-2.0
"""Write pictures.npz: metrics of scikit-image, and SR3's network and schedules as published.

Run:  python tests/goldens/make_pictures.py --reference=<checkout of
      Janspiry/Image-Super-Resolution-via-Iterative-Refinement>

Needs torch and scikit-image. The network is small and random; its attention is the published one
(one head), which our softmax equals when the biases of query, key and value are zero.
"""

import argparse
import pathlib
import sys

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("pictures.npz")
NETWORK = dict(
    in_channel=4, out_channel=2, inner_channel=8, norm_groups=4, channel_mults=(1, 2),
    attn_res=(8,), res_blocks=1, image_size=8,
)  # fmt: skip
TIMES = (0, 1, 2, 500, 1000, 1998, 1999)


def metrics() -> dict[str, np.ndarray]:
    """Two noisy pictures of 24 x 19 in colour."""
    from skimage import metrics as skimage

    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.linspace(0, 200, 24), np.linspace(0, 50, 19))[..., None]
    reference = np.stack([smooth.repeat(3, -1), rng.integers(0, 256, (24, 19, 3))])
    noise = rng.normal(0, [[[[25.0]]], [[[60.0]]]], reference.shape)
    clip = lambda x: np.clip(np.rint(x), 0, 255).astype(np.uint8)
    reference, picture = clip(reference), clip(reference + noise)
    options = dict(sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)
    similarity = lambda a, b: skimage.structural_similarity(a, b, gaussian_weights=True, **options)
    return {
        "picture": picture,
        "reference": reference,
        "psnr": np.array([
            skimage.peak_signal_noise_ratio(b, a, data_range=255)
            for a, b in zip(picture, reference, strict=True)
        ]),
        "ssim": np.array([similarity(a, b) for a, b in zip(picture, reference, strict=True)]),
    }  # fmt: skip


def network(unet) -> dict[str, np.ndarray]:
    """Weights that float16 holds exactly, inputs and answers; and the counts of the full size.

    Missing axes in `weights/shapes` are 0.
    """
    import torch

    rng = np.random.default_rng(1)
    model = unet.UNet(**NETWORK).double().eval()
    state = {}
    for name, tensor in model.state_dict().items():
        values = 0.2 * rng.standard_normal(tuple(tensor.shape))
        values += 1.0 if ".norm.weight" in name or ".block.0.weight" in name else 0.0
        state[name] = values.astype(np.float16)
    model.load_state_dict({k: torch.from_numpy(v.astype(np.float64)) for k, v in state.items()})
    low, noisy = rng.standard_normal((2, 3, 8, 8, 2)).astype(np.float16)
    level = np.array([0.05, 0.5, 0.999])
    joined = np.concatenate([low, noisy], axis=-1).astype(np.float64).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = model(torch.from_numpy(joined), torch.from_numpy(level))
    counts = {}
    for name, sides in (("softmax", (16, 32, 64)), ("all", (16, 32, 64, 128))):
        full = unet.UNet(
            in_channel=6, out_channel=3, inner_channel=64, channel_mults=(1, 2, 4, 8, 8),
            attn_res=sides, res_blocks=2, dropout=0.2, image_size=128,
        )  # fmt: skip
        counts[f"count/{name}"] = np.array(sum(p.numel() for p in full.parameters()))
        widths = [m.qkv.in_channels for m in full.modules() if hasattr(m, "qkv")]
        counts[f"biases/{name}"] = np.array(3 * sum(widths))
    return counts | {
        "weights": np.concatenate([value.ravel() for value in state.values()]),
        "weights/names": np.array(list(state)),
        "weights/shapes": np.array([(*v.shape, 0, 0, 0)[:4] for v in state.values()]),
        "low": low, "noisy": noisy, "level": level,
        "noise": out.numpy().transpose(0, 2, 3, 1).astype(np.float32),
    }  # fmt: skip


def schedules(diffusion) -> dict[str, np.ndarray]:
    """Levels of both schedules, and what a step of the published sampler multiplies with."""
    process = diffusion.GaussianDiffusion(None, 8)
    made = {}
    for name in ("linear", "cosine"):
        process.set_new_noise_schedule(
            dict(schedule=name, n_timestep=2000, linear_start=1e-6, linear_end=1e-2), "cpu"
        )
        made[f"{name}/levels"] = np.asarray(process.sqrt_alphas_cumprod_prev)[[0, *TIMES[1:], 2000]]
        times = list(TIMES)
        made[f"{name}/clean"] = process.posterior_mean_coef1.numpy()[times]
        made[f"{name}/noisy"] = process.posterior_mean_coef2.numpy()[times]
        made[f"{name}/variance"] = process.posterior_variance.numpy()[times]
        made[f"{name}/inverse"] = process.sqrt_recip_alphas_cumprod.numpy()[times]
        made[f"{name}/ratio"] = process.sqrt_recipm1_alphas_cumprod.numpy()[times]
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", required=True)
    sys.path.insert(0, str(pathlib.Path(parser.parse_args().reference) / "model/sr3_modules"))
    import diffusion
    import unet

    np.savez_compressed(GOLDENS, **metrics(), **network(unet), **schedules(diffusion))


if __name__ == "__main__":
    main()
