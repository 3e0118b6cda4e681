"""How much faster is it than the original, with the same weights, crop, mask and noise?

    python benchmarks/speed/vs_original.py --original DIR [--weights DIR] [--device cuda]
        [--threads 2] [--eager]

DIR is the reader's own checkout of github.com/MrGiovanni/DiffTumor (licence CC BY-NC-ND, which is
why no line of it is here); its ``synthesize_early_tumor`` is called as it is. It needs einops_exts
and rotary_embedding_torch. Changed while it runs, not in its files:

- packages that synthesis does not use are replaced by empty ones where they are not installed, and
  Lightning by the one base class that it does use;
- the perceptual loss, which its constructor downloads and synthesis does not use;
- ``.cuda()`` on its autoencoder, which has no place on a CPU: it is built without, then given it;
- ``get_fixed_geo`` returns the mask that ours has drawn. Ours draws it within the time measured.

--weights: a folder with AutoencoderModel.ckpt and liver_early.pt. Without it both get the same
random weights of the published sizes: the time is the same, the pictures mean nothing.
One row is another computation than the original's, and says so: the published networks on a crop
of 64^3 around the tumour instead of 96^3.
All take turns, one call each, after a first call that tells the memory. Both sides get the noise
of one seed of the device.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import arguments, clock, environment, parse, picture, spread, write
from tumorsynth.commands.timing import Watch, patch_and_label, peak_mib
from tumorsynth.devices import full_float32
from tumorsynth.generators.difftumor import AUTOENCODER_NAMES, DENOISER_NAMES, published_names
from tumorsynth.generators.diffusion import Generator
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.models.unet import FactorizedUNet

UNUSED = (  # by synthesis, once the masks are given
    "cv2 elasticdeform SimpleITK hydra matplotlib matplotlib.pyplot imageio imageio.core "
    "imageio.core.util torchvision torchvision.models torchvision.transforms torchvision.utils "
    "requests yaml PIL tqdm"
).split()
NEEDED = ("einops_exts", "rotary_embedding_torch")


class LightningModule(torch.nn.Module):
    """All of Lightning that the original's synthesis uses: a base class."""

    def save_hyperparameters(self) -> None:
        pass


LIGHTNING: Any = ModuleType("pytorch_lightning")
LIGHTNING.LightningModule = LightningModule
SIDE, SEED = 96, 1
# not what was published: the networks see 0.3 of the voxels, and what they make differs
SMALLER = "published sizes, bfloat16, another crop: 64^3"
MODEL = {  # of the published autoencoder
    "embedding_dim": 8,
    "n_codes": 16384,
    "n_hiddens": 16,
    "downsample": [4, 4, 4],
    "disc_channels": 64,
    "disc_layers": 3,
    "disc_loss_type": "hinge",
    "image_gan_weight": 1.0,
    "video_gan_weight": 1.0,
    "l1_weight": 4.0,
    "gan_feat_weight": 4.0,
    "perceptual_weight": 4.0,
    "restart_thres": 1.0,
    "no_random_restart": False,
    "norm_type": "group",
    "padding_type": "replicate",
    "num_groups": 32,
}


class Original:
    """The original's early synthesis, built from a checkout and our networks' weights."""

    def __init__(self, checkout: Path, ours: Generator, device: torch.device) -> None:
        for name in NEEDED:
            try:  # before the empty ones are there for them to find
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                raise SystemExit(f"the original needs {error.name}: pip install it") from None
        self.replaced = []
        try:
            importlib.import_module("pytorch_lightning")
        except ImportError:
            sys.modules["pytorch_lightning"] = LIGHTNING
            self.replaced.append("pytorch_lightning")
        for name in UNUSED:
            try:
                importlib.import_module(name)
            except ImportError:
                sys.modules[name] = MagicMock()
                self.replaced.append(name)
        folders = [checkout, checkout / "STEP3.SegmentationModel"]
        step = next((f for f in folders if (f / "TumorGeneration" / "utils.py").exists()), None)
        if step is None:
            raise SystemExit(f"{checkout} has no STEP3.SegmentationModel/TumorGeneration/utils.py")
        sys.path.insert(0, str(step))
        self.code: Any = importlib.import_module("TumorGeneration.utils")
        model = importlib.import_module("TumorGeneration.ldm.vq_gan_3d.model.vqgan")
        model.LPIPS = torch.nn.Identity
        config = SimpleNamespace(
            model=SimpleNamespace(**MODEL), dataset=SimpleNamespace(image_channels=1)
        )
        self.vqgan = model.VQGAN(config).eval()
        self._load(self.vqgan, ours.autoencoder, AUTOENCODER_NAMES, "codebook.")
        unet = self.code.Unet3D(dim=24, dim_mults=[1, 2, 4, 8], channels=17, out_dim=8)
        self._load(unet, ours.denoiser, DENOISER_NAMES, "rotary")
        self.diffusion = self.code.GaussianDiffusion(
            unet, image_size=24, num_frames=24, channels=17, timesteps=4, device=device
        )
        self.diffusion.vqgan = self.vqgan
        self.diffusion.to(device).eval()
        self.device = device

    @staticmethod
    def _load(network: Any, ours: Any, renames: Any, own: str) -> None:
        """Our tensors under the published names; what is missing must be of no use or ours."""
        state, theirs = ours.state_dict(), network.state_dict()
        names = published_names(renames, state)
        table = {
            new: state[old].reshape(theirs[new].shape)
            for old, new in names.items()
            if new in theirs
        }
        missing = network.load_state_dict(table, strict=False).missing_keys
        skip = ("image_discriminator", "video_discriminator", "perceptual_model")
        left = [key for key in missing if not key.startswith(skip) and "rotary" not in key]
        unknown = [new for new in names.values() if new not in theirs and own not in new]
        if left or unknown:
            raise SystemExit(f"the checkout differs from the published model: {left}, {unknown}")

    def __call__(self, crop: Tensor, mask: Tensor, sigma: float = 1.0) -> tuple[Tensor, Tensor]:
        """The blended crop and the label, (1, 1, 96, 96, 96); `sigma` in voxels."""
        self.code.get_fixed_geo = lambda *_: mask[0, 0].cpu().numpy()
        uniform, np.random.uniform = np.random.uniform, lambda *_: sigma
        tester = SimpleNamespace(ema_model=self.diffusion)
        torch.manual_seed(SEED)
        try:
            return self.code.synthesize_early_tumor(
                crop, torch.ones_like(crop), "liver", self.vqgan, tester
            )
        finally:
            np.random.uniform = uniform

    def steps(self) -> list[tuple[Any, str, str]]:
        return [
            (self.vqgan, "encode", "encode"),
            (self.diffusion, "p_sample_loop", "denoise"),
            (self.vqgan.codebook, "forward", "quantise"),
            (self.vqgan, "decode", "decode"),
        ]


def noise_of(device: torch.device) -> Tensor:
    """What the original draws after `torch.manual_seed(SEED)`: (5, 1, 8, 24, 24, 24)."""
    torch.manual_seed(SEED)
    return torch.stack([torch.randn(1, 8, 24, 24, 24, device=device) for _ in range(5)])


def our_steps(synth: ts.SynthesizeTumor, device: torch.device) -> list[tuple[Any, str, str]]:
    generator = synth.handle.get(device)
    steps = [
        (generator, "_encode", "encode"),
        (generator, "sample", "denoise"),
        (generator, "_decode", "decode"),
    ]
    if generator.autoencoder.codebook is not None:
        steps.append((generator.autoencoder, "quantize", "quantise"))
    return steps


def lap(run: Callable[[], Any], steps: list[Any], device: torch.device) -> dict[str, Any]:
    """Wall and CPU ms of each step of one call, and of the whole."""
    watch = Watch(device)
    caller = SimpleNamespace(run=run)
    for owner, name, key in steps:
        watch.wrap(owner, name, key)
    watch.wrap(caller, "run", "blend and rest")
    try:
        caller.run()
    finally:
        for owner, name, _ in steps:
            del owner.__dict__[name]
    spent = watch.spent
    whole = tuple(sum(s[i] for s in spent.values()) for i in (0, 1))
    return {**spent, "whole": whole}


def differences(original: Original, ours: Generator, crop: Tensor, mask: Tensor) -> dict[str, Any]:
    """HU by which what ours decodes differs from what the original decodes, by precision.

    Without TF32, which rounds by more than the two differ.
    """
    kept: list[Tensor] = []
    decode = original.vqgan.decode

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(decode(*args, **kwargs))
        return kept[-1]

    original.vqgan.__dict__["decode"] = keep
    try:
        with full_float32(original.device.type):
            original(crop, mask)
    finally:
        del original.vqgan.__dict__["decode"]
    theirs = ((kept[0].float() + 1) / 2).clamp(0, 1).permute(0, 1, 3, 4, 2)
    noise, found = noise_of(original.device), {}
    for ours.precision in ("float32", "bfloat16"):
        with full_float32(original.device.type):
            made = ours.inpaint(crop, mask, noise=noise)
        hu = (made - theirs) * (ours.window[1] - ours.window[0])
        found[ours.precision] = {
            "rms_hu_in_tumour": round(float(hu[mask].square().mean().sqrt()), 4),
            "max_hu": round(float(hu.abs().max()), 4),
        }
    ours.precision = "auto"
    return found


def four_convolutions(device: torch.device) -> Callable[[], Any]:
    layer = torch.nn.Conv3d(32, 32, 3, padding=1).to(device).requires_grad_(False)
    x = torch.randn(1, 32, SIDE, SIDE, SIDE, device=device)
    return lambda: [layer(x) for _ in range(4)]


def main() -> None:
    parser = arguments(__doc__, "vs_original", repeats=3)
    parser.add_argument("--original", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, metavar="DIR")
    parser.add_argument("--eager", action="store_true", help="on a GPU: leave out what is compiled")
    args = parse(parser)
    device = args.device
    torch.manual_seed(0)
    if args.weights:
        published = Generator.from_difftumor(
            args.weights / "AutoencoderModel.ckpt", args.weights / "liver_early.pt"
        )
    else:
        published = Generator(Autoencoder(), FactorizedUNet())
    published.to(device)
    reduced = published.with_sampler()
    reduced.precision = "bfloat16"
    original = Original(args.original, published, device)

    image, label = patch_and_label(SIDE, device=device)
    common = {"count": 1, "size_mm": 18.0}
    synths = {
        "published sizes, float32": ts.SynthesizeTumor(
            published, blend="difftumor", sigma_mm=1.0, **common
        ),
        "published sizes, bfloat16": ts.SynthesizeTumor(
            reduced, blend="difftumor", sigma_mm=1.0, **common
        ),
        SMALLER: ts.SynthesizeTumor(
            reduced.with_sampler(crop_size=64), blend="difftumor", sigma_mm=1.0, **common
        ),
        "liver-early": ts.SynthesizeTumor("liver-early", **common),
    }
    if device.type == "cuda" and not args.eager:
        graphs = reduced.with_sampler().compile()
        synths["published sizes, bfloat16, compiled"] = ts.SynthesizeTumor(
            graphs, blend="difftumor", sigma_mm=1.0, **common
        )
        shipped = ts.load_generator("liver-early", device).with_sampler().compile()
        synths["liver-early, compiled"] = ts.SynthesizeTumor(shipped, **common)
    mask = synths["liver-early"](image, label, spacing=1.0, seed=0)[1] == 2
    low, high = published.window
    crop = ((image - low) / (high - low)).clamp(0, 1)
    yardstick = four_convolutions(device)
    runs: dict[str, tuple[Callable[[], Any], list[Any]]] = {
        "original": (lambda: original(crop, mask), original.steps()),
        "four convolutions": (yardstick, []),
    }
    for name, synth in synths.items():
        runs[name] = (
            lambda synth=synth: synth(image, label, spacing=1.0, seed=0),
            our_steps(synth, device),
        )
    peaks = {}
    for name, (run, _) in runs.items():
        for _ in range(3 if device.type == "cuda" else 0):  # CUDA graphs are recorded by then
            run()
        peaks[name] = peak_mib(run, device)
        print(f"{name}: {peaks[name]} MiB", flush=True)
    laps: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    difference = differences(original, published, crop, mask)
    print(difference, flush=True)

    def row(name: str) -> dict[str, Any]:
        found = laps[name]
        clocks = list(enumerate(("wall_ms", "cpu_ms")))
        steps = {
            key: {clock: spread([one[key][i] for one in found]) for i, clock in clocks}
            for key in found[0]
        }
        return {"peak_mib": peaks[name], **steps}

    def ratio(above: dict[str, Any], below: dict[str, Any]) -> dict[str, float]:
        clocks = ("wall_ms", "cpu_ms")
        return {
            c: round(above["whole"][c]["median"] / below["whole"][c]["median"], 3) for c in clocks
        }

    for number in range(args.repeats):
        for name, (run, steps) in runs.items():
            laps[name].append(lap(run, steps, device))
            print(name, round(laps[name][-1]["whole"][0]), "ms", flush=True)
        rows = {name: row(name) for name in runs}
        theirs, four = rows["original"], rows["four convolutions"]
        results = {
            "device": str(device),
            "threads_used": torch.get_num_threads(),
            "weights": "published" if args.weights else "random, of the published sizes",
            "replaced_packages": original.replaced,
            "repeats": number + 1,
            "rows": rows,
            "times_faster_than_the_original": {n: ratio(theirs, rows[n]) for n in synths},
            "share_of_four_convolutions": {n: ratio(rows[n], four) for n in synths},
            "difference": difference,
        }
        write(args.output, results)  # after each round: what comes now may not end
    for name in original.replaced:  # an empty matplotlib draws nothing
        del sys.modules[name]
    picture(args.output, lambda axes: draw(axes, rows, device))


def draw(axes: Any, rows: dict[str, Any], device: torch.device) -> None:
    ms, words = clock(device)
    names = [name for name in rows if name != "four convolutions"]
    left = np.zeros(len(names))
    for key in ("encode", "denoise", "quantise", "decode", "blend and rest"):
        width = np.array([rows[n].get(key, {}).get(ms, {}).get("median", 0) for n in names])
        axes.barh([n.replace(", ", ",\n") for n in names], width / 1e3, left=left, label=key)
        left += width / 1e3
    axes.invert_yaxis()
    axes.set_xlabel(f"s of {words} a tumour")
    axes.set_title(environment()["cpu" if device.type == "cpu" else "gpu"], fontsize=8)
    axes.legend(fontsize=6)


if __name__ == "__main__":
    main()
