"""What the loss costs: from hidden states and output heads to gradients, against the four products nobody can avoid.

    python tests/benchmarks/loss_stage.py                    # every implementation, each in a process of its own
    python tests/benchmarks/loss_stage.py --dtype bf16 --tokens 8192 forward_kl textbook

Prints time over the floor's in the same process, median of the pairs, and the peak of resident memory over what the
inputs hold (Linux). Liger-Kernel takes part where it is installed (`pip install --no-deps liger-kernel`).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_recipes import losses
from kd_recipes.losses.fused import Tokens, fused_loss
from kd_recipes.losses.rows import Terms
from kd_recipes.signals import DenseSignal, LinearLogits

DIVERGENCES = {
    "forward_kl": losses.ForwardKL(),
    "reverse_kl": losses.ReverseKL(),
    "symmetric_kl": losses.SymmetricKL(),
    "jensen_shannon": losses.JensenShannon(),
    "skew_forward_kl": losses.SkewForwardKL(),
    "skew_reverse_kl": losses.SkewReverseKL(),
    "adaptive_kl": losses.AdaptiveKL(),
    "alpha_beta": losses.AlphaBeta(),
    "total_variation": losses.TotalVariation(),
}
PEERS = ("textbook", "torchtune", "torchtune_8_chunks", "liger")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(name: str) -> Loss:
    """Half the divergence, half the cross entropy, on the fused path."""
    terms = Terms(DIVERGENCES[name], 0.5, 1.0, 1.0, 0.0)

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        tokens = Tokens(None, labels, torch.full(labels.shape, 1 / len(labels)))
        signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
        return fused_loss(LinearLogits((hidden,), (weight,)), signal, tokens, terms, num_ids=len(weight))[0]

    return loss


def textbook(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits, log-softmax in float32."""
    z, t = F.linear(hidden, weight).float(), F.linear(teacher_hidden, teacher_weight).float()
    kl = F.kl_div(F.log_softmax(z, -1), F.log_softmax(t, -1), log_target=True, reduction="none").sum(-1).mean()
    return 0.5 * kl + 0.5 * F.cross_entropy(z, labels)


def torchtune(num_chunks: int) -> Loss:
    """torchtune's own losses, whole or in chunks."""
    from torchtune.modules import loss as tt

    if num_chunks == 1:
        kd: torch.nn.Module = tt.ForwardKLLoss()
        ce: torch.nn.Module = torch.nn.CrossEntropyLoss()
    else:
        kd, ce = tt.ForwardKLWithChunkedOutputLoss(num_chunks), tt.CEWithChunkedOutputLoss(num_chunks)

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        if num_chunks == 1:
            z, t = F.linear(hidden, weight).float(), F.linear(teacher_hidden, teacher_weight).float()
            return 0.5 * kd(z, t, labels) + 0.5 * ce(z, labels)
        z, t = (
            [F.linear(part, head).unsqueeze(0) for part in x.chunk(num_chunks)]
            for x, head in ((hidden, weight), (teacher_hidden, teacher_weight))
        )
        return 0.5 * kd(z, t, labels.unsqueeze(0)) + 0.5 * ce(z, labels.unsqueeze(0))  # type: ignore[no-any-return]

    return loss


def liger() -> Loss:
    """Liger-Kernel's pure torch path, in chunks of 256."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=False, chunk_size=256
    )
    return lambda hidden, weight, teacher_hidden, teacher_weight, labels: module(
        hidden, weight, teacher_hidden, teacher_weight, labels
    )


def choose(name: str) -> Loss:
    """The implementation of that name."""
    if name in DIVERGENCES:
        return ours(name)
    if name == "textbook":
        return textbook
    return liger() if name == "liger" else torchtune(8 if name == "torchtune_8_chunks" else 1)


def status(field: str) -> int:
    """A figure of this process in bytes; 0 where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def seconds(action: Callable[[], object]) -> float:
    """That it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, args: argparse.Namespace) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]

    def random(rows: int, columns: int, std: float) -> Tensor:
        return torch.cat(
            [torch.randn(len(part), columns).mul_(std).to(dtype) for part in torch.empty(rows).split(8192)]
        )

    hidden, teacher_hidden = random(args.tokens, 896, 1.0), random(args.tokens, 1536, 1.0)
    weight, teacher_weight = random(args.ids, 896, 2 / 896**0.5), random(args.ids, 1536, 2 / 1536**0.5)
    labels = torch.randint(0, args.ids, (args.tokens,))
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = choose(name)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, teacher_hidden, teacher_weight, labels).backward()

    gc.collect()
    base, clear_refs = status("VmRSS"), Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")
    step()
    extra = status("VmHWM") - base
    hidden.grad = weight.grad = None
    logits = torch.empty(args.tokens, args.ids, dtype=dtype)
    grads = torch.empty_like(hidden), torch.empty_like(weight)

    @torch.no_grad()
    def floor() -> None:
        torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grads[0])
        torch.mm(logits.t(), hidden, out=grads[1])

    if args.repeats:
        floor()
    ratios = [1 / seconds(floor) * seconds(step) for _ in range(args.repeats)]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    return f"| {name} | {ratio} | {extra / 2**20:,.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*DIVERGENCES, *PEERS))}; all by default")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ids", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3, help="0 measures memory alone")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.names[0], args), flush=True)
        return
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    print(f"{args.tokens} tokens, {args.ids} ids, {args.dtype}\n")
    print("| implementation | time / floor | extra MiB |\n|---|---:|---:|", flush=True)
    for name in args.names or [*DIVERGENCES, *(peer for peer in PEERS if peer != "liger" or has_liger)]:
        settings = ["--dtype", args.dtype, "--tokens", args.tokens, "--ids", args.ids, "--repeats", args.repeats]
        subprocess.run([sys.executable, __file__, name, "--one", *map(str, settings)], check=True)


if __name__ == "__main__":
    main()
