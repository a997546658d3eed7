# SPDX-License-Identifier: Apache-2.0
"""Write dit.npz: small random networks of the released DiT and MoH-DiT, losses and a step back.

Run:  python tests/goldens/make_dit.py --dit=<checkout of facebookresearch/DiT>
      --moh=<checkout of SkyworkAI/MoH>

Needs torch and timm. Weights are numbers that float16 holds; everything is computed in float64,
apart from the angles of time.
"""

import argparse
import importlib.util
import pathlib
import sys

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("dit.npz")
SIZES = dict(
    input_size=6, patch_size=2, in_channels=3, hidden_size=24, mlp_ratio=2.0, num_classes=3
)
MIXTURE = dict(
    depth=3, num_heads=[4, 4, 3], head_dim=6, moh=True, shared_head=[2, 0, 3],
    routed_head=[1, 2, 0],
)  # fmt: skip
TIMES = (0, 1, 500, 999)


def load(name: str, path: pathlib.Path):
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(models, seed: int, **fields) -> dict[str, np.ndarray]:
    """Weights, inputs and the answer of a network."""
    import torch

    rng = np.random.default_rng(seed)
    plain = models.TimestepEmbedder.timestep_embedding
    models.TimestepEmbedder.timestep_embedding = staticmethod(lambda t, d: plain(t, d).double())
    model = models.DiT(**SIZES, **fields).double().eval()
    state = {}
    for name, tensor in model.state_dict().items():
        values = 0.3 * rng.standard_normal(tuple(tensor.shape))
        state[name] = tensor.numpy() if name == "pos_embed" else values.astype(np.float16)
    model.load_state_dict({k: torch.from_numpy(v.astype(np.float64)) for k, v in state.items()})
    noisy = rng.standard_normal((4, 6, 6, 3)).astype(np.float16)
    time, label = np.array([0, 10, 500, 999]), np.array([0, 1, 2, 3])
    picture = torch.from_numpy(noisy.astype(np.float64).transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = model(picture, torch.from_numpy(time), torch.from_numpy(label))
        guided = model.forward_with_cfg(picture, torch.from_numpy(time[[1, 1, 1, 1]]),
                                        torch.from_numpy(np.array([0, 1, 3, 3])), 1.5)  # fmt: skip
    state.pop("pos_embed")
    return {
        "weights": np.concatenate([value.ravel() for value in state.values()]),
        "names": np.array(list(state)),
        "shapes": np.array([(*v.shape, 0, 0, 0)[:4] for v in state.values()]),
        "noisy": noisy, "time": time, "label": label,
        "prediction": out.numpy().transpose(0, 2, 3, 1).astype(np.float32),
        "guided": guided.numpy().transpose(0, 2, 3, 1).astype(np.float32)[:2],
    }  # fmt: skip


def process(diffusion) -> dict[str, np.ndarray]:
    """Losses of given answers at some times, moments of shorter samplers, and their times."""
    import torch

    rng = np.random.default_rng(2)
    clean = np.clip(rng.normal(0, 0.8, (4, 3, 3, 2)), -1, 1)
    noise, error, share = rng.standard_normal((3, *clean.shape))
    answer = np.concatenate([noise + 0.1 * error, 0.7 * share], axis=-1)
    to_torch = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2))
    made = {"clean": clean, "noise": noise, "answer": answer, "times": np.array(TIMES)}
    whole = diffusion.create_diffusion("")
    terms = whole.training_losses(
        lambda x, t: to_torch(answer), to_torch(clean), torch.tensor(TIMES), noise=to_torch(noise)
    )
    made |= {"squares": terms["mse"].numpy(), "bound": terms["vb"].numpy()}
    short = diffusion.create_diffusion("250")
    moments = short.p_mean_variance(
        lambda x, t: to_torch(answer), to_torch(noise), torch.tensor([0, 1, 100, 249]),
        clip_denoised=False,
    )  # fmt: skip
    made["mean"] = moments["mean"].numpy().transpose(0, 2, 3, 1)
    made["log_variance"] = moments["log_variance"].numpy().transpose(0, 2, 3, 1)
    for count in (2, 163, 250):
        made[f"times/{count}"] = np.array(diffusion.create_diffusion(str(count)).timestep_map)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dit", required=True)
    parser.add_argument("--moh", required=True)
    arguments = parser.parse_args()
    root, moh = pathlib.Path(arguments.dit), pathlib.Path(arguments.moh) / "MoH-DiT"
    sys.path.insert(0, str(root))
    import diffusion

    dense = network(load("dit_models", root / "models.py"), 0, depth=2, num_heads=3)
    mixed = network(load("moh_models", moh / "models.py"), 1, **MIXTURE)
    made = {f"dense/{name}": value for name, value in dense.items()}
    made |= {f"mixed/{name}": value for name, value in mixed.items()}
    np.savez_compressed(GOLDENS, **made, **process(diffusion))


if __name__ == "__main__":
    main()
