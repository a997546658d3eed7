# SPDX-License-Identifier: Apache-2.0
"""PyTorch's attention in a process of its own: python -m attnjax.benchmarks.torch_worker

Reads one JSON object per line and answers with one. {"case": {...}} prepares a case, {"run": 1}
answers with the seconds of one call. Two frameworks in one process would fight over its threads.
"""

import json
import sys
import time


def main() -> None:
    """Serve requests until the input ends."""
    import torch

    work = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            try:
                work = prepare(torch, **request["case"])
                answer = {"ready": f"torch {torch.__version__}"}
            except (ValueError, RuntimeError) as error:
                work, answer = None, {"refused": str(error).splitlines()[0]}
        else:
            begun = time.perf_counter()
            work()
            answer = {"seconds": time.perf_counter() - begun}
        print(json.dumps(answer), flush=True)


def prepare(torch, shape, kv_heads, dtype, mask, direction, threads):
    """Return a function that runs one forward, or forward and backward, pass.

    Args:
      torch: the module.
      shape: `[b, n, t, h]`, torch's own order.
      kv_heads: key/value heads.
      dtype: name of the dtype.
      mask: "full" or "causal".
      direction: "forward", "backward" or "both".
      threads: CPU threads; 0 leaves torch's choice.

    Raises:
      ValueError: another mask.
    """
    if mask not in ("full", "causal"):
        raise ValueError(f"torch's fused attention has no mask {mask!r}")
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)
    b, n, t, h = shape
    make = lambda heads: torch.randn(
        b, heads, t, h, generator=generator, device=device, dtype=getattr(torch, dtype)
    )
    query, key, value, cotangent = make(n), make(kv_heads), make(kv_heads), make(n)
    attend = torch.nn.functional.scaled_dot_product_attention
    options = {"is_causal": mask == "causal", "enable_gqa": n != kv_heads}

    def forward():
        with torch.inference_mode():
            attend(query, key, value, **options)
        if device == "cuda":
            torch.cuda.synchronize()

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]

    def both():
        out = attend(*leaves, **options)
        torch.autograd.grad(out, leaves, cotangent)
        if device == "cuda":
            torch.cuda.synchronize()

    if direction == "backward":
        kept = attend(*leaves, **options)

    def backward():
        torch.autograd.grad(kept, leaves, cotangent, retain_graph=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"forward": forward, "backward": backward, "both": both}[direction]


if __name__ == "__main__":
    main()
