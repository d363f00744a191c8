"""Quantization-aware training on several processes: plain torch DistributedDataParallel, two of them, on the CPU.

    python examples/ddp.py

Each process calibrates on its own share of the data and all end with the same grids; DDP averages the gradients; the
first process alone converts and writes. `work` is what a script for torchrun would hold. Seconds on one core.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import edgeqat as eq

PROCESSES = 2


def network() -> nn.Sequential:
    """float images [N, 1, 8, 8] to 10 logits."""
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10))


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int, lr: float) -> None:
    """A plain loop; every process ends it with the same weights."""
    replicas = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(replicas(images), targets).backward()
            optimizer.step()
    model.eval()


def work(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    digits = load_digits()
    images, targets = torch.from_numpy(digits.images).float().div(16).unsqueeze(1), torch.from_numpy(digits.target)
    data = TensorDataset(images[:1400], targets[:1400])
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data, PROCESSES, rank))

    model = network()
    train(model, loader, epochs=4, lr=0.05)
    # After init_process_group: only then does calibrate know of the other processes.
    sim = eq.prepare(model, images[:2], target="onnxruntime")
    eq.calibrate(sim, [images for images, _ in loader])
    train(sim, loader, epochs=2, lr=0.01)

    for name, own in sim.state_dict().items():
        first = own.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(own, first), f"process {rank} ended with another {name}"
    if rank == 0:
        write(sim, images[1400:], targets[1400:])
    dist.barrier()
    dist.destroy_process_group()


def write(sim: eq.SimulatedModel, images: Tensor, targets: Tensor) -> None:
    """Converts, lowers, verifies."""
    program = eq.convert(sim)
    with TemporaryDirectory() as folder:
        artifact = eq.lower(program, "onnxruntime", f"{folder}/digits")
        parity = eq.verify(artifact, program, [images])
        accuracy = float((artifact.run(images).argmax(1) == targets).float().mean())
    print(f"{PROCESSES} processes ended with equal weights and grids: {len(sim.state_dict())} tensors compared")
    print(f"top-1 of the file {accuracy:.1%}, {parity.bit_identical:.0%} of its logits bit-identical to the reference")
    assert parity.bit_identical == 1.0, parity.first_difference


def main() -> None:
    """Starts the processes; one that fails fails this."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (str(Path(folder)),), PROCESSES)


if __name__ == "__main__":
    main()
