# SPDX-License-Identifier: Apache-2.0
"""The released attentions of CAB, for the scripts that write outputs of theirs. Needs torch."""

import pathlib
import sys
import types


def load(reference: str):
    """Import the library from a checkout of Shark-NLP/CAB, with what it only imports stubbed."""
    import torch

    stub = types.ModuleType("opt_einsum")
    stub.contract, stub.contract_expression = torch.einsum, None
    sys.modules.setdefault("opt_einsum", stub)
    sys.path.insert(0, str(pathlib.Path(reference) / "efficient-attention"))
    import efficient_attention

    return efficient_attention
