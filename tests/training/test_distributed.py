"""Two processes that train together: each rank's own tumours, one network, the same again."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,  # each process imports the framework anew
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10)}
STEPS, BATCH = 2, 2


def scan():
    axes = torch.meshgrid(*(torch.linspace(-1, 1, 32),) * 3, indexing="ij")
    label = (sum(a**2 for a in axes) < 0.7)[None].long()
    return {"image": 60.0 + 40 * label, "label": label}


class Network(torch.nn.Module):
    """Sees the labels; its weights tell what it has learned from."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Conv3d(1, 3, 1)
        self.seen = []

    def forward(self, image, label):
        self.seen += [hashlib.sha256(one.numpy().tobytes()).hexdigest()[:12] for one in label]
        assert all((one == 2).any() for one in label)
        return torch.nn.functional.cross_entropy(self.net(image / 100), label[:, 0])


def with_monai(workers, on_batch):
    """A plain DDP loop; the same seed on every rank, as people write it."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose
    from monai.utils import set_determinism

    from tumorsynth.monai import BatchSynthesizeTumord, RandSynthesizeTumord

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    set_determinism(0)
    kind = BatchSynthesizeTumord if on_batch else RandSynthesizeTumord
    synthesis = Compose([kind("image", "label", **SETTINGS)]).set_random_state(0)
    data = Dataset([scan()] * (STEPS * BATCH * 2), None if on_batch else synthesis)
    sampler = torch.utils.data.DistributedSampler(data)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=workers)
    network = Network()
    model = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for batch in loader:
        batch = synthesis(batch) if on_batch else batch
        optimizer.zero_grad()
        model(batch["image"], batch["label"]).backward()
        optimizer.step()
    return network


def with_lightning():
    import lightning as L

    from tumorsynth.lightning import TumorSynthCallback

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def training_step(self, batch, batch_idx):
            return self.network(batch["image"], batch["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    L.seed_everything(0)
    callback = TumorSynthCallback(**SETTINGS)
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [scan()] * (STEPS * BATCH * 2)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=BATCH))
    seeds = [None, None]
    torch.distributed.all_gather_object(seeds, callback.seed)
    assert seeds[0] == seeds[1]  # the checkpoint keeps one
    return module.network


@pytest.mark.parametrize("what", [("monai", "2"), ("monai", "0", "batch"), ("lightning",)])
def test_ranks_make_their_own_tumours_for_one_network(what, tmp_path):
    pytest.importorskip(what[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        + [f"--master_port={port}", __file__, str(tmp_path), *what],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    seen = first[0]["seen"] + second[0]["seen"]
    assert len(set(seen)) == 2 * STEPS * BATCH  # no tumour twice, within a rank or across them
    assert first[0]["weights"] == second[0]["weights"]
    assert first[0] == first[1] and second[0] == second[1]  # the same seed, the same again


def main():
    folder, name, *more = sys.argv[1:]
    runs = []
    for _ in range(2):
        if name == "lightning":
            network = with_lightning()
        else:
            network = with_monai(int(more[0]), on_batch=len(more) > 1)
        weights = torch.cat([p.detach().ravel() for p in network.parameters()]).tolist()
        runs.append({"weights": weights, "seen": network.seen})
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
