# SPDX-License-Identifier: Apache-2.0
"""Pictures that an autoencoder has turned into small grids of vectors, from .npz files.

Nothing is unpickled. Arrays that are stored without compression (`numpy.savez`) stay on the disk
until they are read.
"""

import os
import pathlib
import zipfile

import numpy as np

from attnjax.errors import RecipeError

SCALE = 0.18215
"""By what the latents of Stable Diffusion's autoencoder are multiplied (arXiv 2112.10752)."""


class LatentFiles:
    """`latents` `[n, y, x, c]`, or `[n, c, y, x]` with `channels_first`, and `labels` `[n]`.

    Args:
      path: an .npz file, or a folder of them, read in the order of names; `~` and environment
        variables are expanded.
      scale: every number is multiplied by it: 0.18215 for raw latents of Stable Diffusion, 1 for
        what is scaled already.
      channels_first: as PyTorch writes them.
      num_classes: labels are below it; 0: not checked.

    Raises:
      RecipeError: no such file, or one with other arrays; the message names it.
    """

    def __init__(
        self, path: str, scale: float = 1.0, channels_first: bool = False, num_classes: int = 0
    ):
        place = pathlib.Path(os.path.expandvars(path)).expanduser()
        files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise RecipeError(f"source.path={path!r}: no .npz file there")
        self.num_classes = num_classes or None
        self._scale, self._axes = np.float32(scale), (1, 2, 0) if channels_first else (0, 1, 2)
        self._files, self._latents, self._labels = files, [], []
        for file in files:
            latents, labels = read_members(file, ("latents", "labels"))
            is_fine = latents.ndim == 4 and latents.dtype.kind == "f" and len(latents)
            if not is_fine or latents.shape[1:] != (self._latents or [latents])[0].shape[1:]:
                raise RecipeError(
                    f"{file}: latents are {latents.dtype}{list(latents.shape)}, expected floating "
                    "[n, y, x, c], alike in all files"
                )
            if labels.shape != latents.shape[:1] or labels.dtype.kind not in "iu":
                raise RecipeError(
                    f"{file}: labels are {labels.dtype}{list(labels.shape)}, expected "
                    f"{len(latents)} integers"
                )
            if num_classes and not (labels.min() >= 0 and labels.max() < num_classes):
                raise RecipeError(
                    f"{file}: labels reach from {labels.min()} to {labels.max()}, "
                    f"source.num_classes={num_classes}"
                )
            self._latents.append(latents)
            self._labels.append(np.asarray(labels))
        self._ends = np.cumsum([len(x) for x in self._latents])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        file, row = self._find(index)
        latent = np.asarray(self._latents[file][row], np.float32) * self._scale
        image = np.ascontiguousarray(latent.transpose(self._axes))
        return {"image": image, "label": np.int32(self._labels[file][row])}

    def _find(self, index):
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def locate(self, index: int) -> str:
        """Return the file and row of an example."""
        file, row = self._find(index)
        return f"{self._files[file]} row {row}"


def read_members(file: pathlib.Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Return arrays of an .npz file, those without compression as maps of the file.

    Raises:
      RecipeError: the file is broken, lacks an array, or holds objects.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in names if name not in held]
            if missing:
                raise RecipeError(
                    f"{file}: lacks {', '.join(missing)}, holds {', '.join(sorted(held))}"
                )
            return [_read(file, archive, held[name]) for name in names]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(f"{file}: not readable as .npz ({error})") from error


def _read(file, archive, info):
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}.get(version)  # fmt: skip
        if read is None:
            raise ValueError(f"array format {version}")
        shape, is_fortran, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds objects")
        header = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or not np.prod(shape):
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    with open(file, "rb") as raw:
        # The header in front of the data repeats the name and may have other extra bytes.
        raw.seek(info.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2")
    offset = info.header_offset + 30 + int(name) + int(extra) + header
    order = "F" if is_fortran else "C"
    return np.memmap(file, dtype, "r", offset, shape, order)
