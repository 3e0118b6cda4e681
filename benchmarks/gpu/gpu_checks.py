"""Is what a GPU makes right? Checks that need torch alone, each a function of the device.

    python -m benchmarks.gpu.gpu_checks [--device cuda] [--compiled with|without|alone]

`tests/test_gpu.py` runs them too: on the CPU those that mean something there, on a GPU all.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import tumorsynth as ts
from benchmarks.common import arguments, parse, write
from benchmarks.gpu import ways
from tumorsynth.commands.timing import crop_and_mask, patch_and_label
from tumorsynth.devices import full_float32
from tumorsynth.generators.diffusion import Generator
from tumorsynth.models import codebook
from tumorsynth.models.codebook import Codebook

# waits that a call costs, and each tumour of a sample: tests/pipeline/test_waits.py. There masks
# are the CPU's, which is one wait less; a tumour that is painted again is one more
CALL, TUMOUR = 6, 2


def tiny(device: torch.device) -> Generator:
    """Without codes and without a step that multiplies an error by 263: rounding stays small."""
    torch.manual_seed(0)
    generator = ways.tiny(codes=0, prediction="x0").to(device)
    generator.precision = "float32"
    return generator


def scan(samples: int) -> tuple[Tensor, Tensor]:
    """(samples, 1, 64, 64, 64): even tissue, all organ but for a margin of background."""
    image, label = patch_and_label(64, samples)
    label[..., :8] = 0
    return image, label


def check_networks_are_the_cpus(device: torch.device) -> None:
    """Shipped weights, in full float32: to 0.1 HU of the CPU's."""
    low, high = ts.load_generator("liver-early").window
    made = []
    for where in (torch.device("cpu"), device):
        generator = ts.load_generator("liver-early", where)
        crop, mask = crop_and_mask(64, 1, where)
        before, generator.precision = generator.precision, "float32"
        try:
            with full_float32(where.type):
                made.append(generator.change(crop, mask, seed=0).cpu() * (high - low))
        finally:
            generator.precision = before
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0.1)


def check_calls_are_the_cpus(device: torch.device) -> None:
    """Placing is exact: the same labels and params. The HU agree to rounding."""
    image, label = scan(3)
    for name, settings in (
        ("hu2023", {"count": 2, "size_mm": (5, 14)}),
        ("tiny", {"count": 2, "size_mm": (6, 12)}),
        ("hu2023", {"mass_effect": 0.5, "size_mm": 14.0, "count": 1}),
        ("tiny", {"contrast_hu": "liver-portal", "size_mm": 25.0, "count": 1}),
    ):
        made = []
        for where in (torch.device("cpu"), device):
            synth = ts.SynthesizeTumor(name if name == "hu2023" else tiny(where), **settings)
            with full_float32(where.type):
                found = synth(image.to(where), label.to(where), spacing=1.0, seed=5)
            assert all(x.device.type == where.type for x in found)
            assert any(record["applied"] for record in synth.report), synth.report
            made.append((*(x.cpu() for x in found), repr(synth.params)))
        assert torch.equal(made[0][1], made[1][1]), f"labels of {name}, {settings}"
        torch.testing.assert_close(made[1][0], made[0][0], rtol=0, atol=0.1)


def check_replay_is_bit_identical(device: torch.device) -> None:
    image, label = (x.to(device) for x in scan(2))
    synth = ts.SynthesizeTumor(tiny(device), count=2, size_mm=(6, 12))
    first = synth(image, label, spacing=1.0, seed=1)
    again = synth(image, label, spacing=1.0, params=synth.params)
    assert torch.equal(first[1], again[1])
    differ = (first[0] != again[0]).sum().item()
    assert not differ, f"{differ} voxels differ by up to {(first[0] - again[0]).abs().max()} HU"


def check_the_fused_search_is_the_slow_one(device: torch.device) -> None:
    """Published size; on CUDA with triton without the table of distances."""
    rng = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, 24, 24, 24, generator=rng).to(device)
    book = Codebook(16384, 8).to(device)
    book.embeddings.copy_(torch.randn(16384, 8, generator=rng))
    latent, tokens = (latent, 4096) if device.type == "cuda" else (latent[:, :, :2, :4], 64)
    found, slow = book.nearest(latent), book.nearest(latent, tokens_per_chunk=tokens)
    differ = found != slow
    share = differ.float().mean().item()
    assert share < 1e-3, f"{share:.2%} of the codes differ"
    z = latent.movedim(1, -1)[differ].double()
    far, near = ((z - book.embeddings[i[differ]].double()).square().sum(-1) for i in (slow, found))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)
    assert device.type != "cuda" or codebook.fused_on == "cuda", "the fused search did not run"


def check_threads_share_compiled_networks(device: torch.device) -> None:
    """Each with a stream of its own, on graphs that keep their inputs in one place."""
    plain, generator = tiny(device), tiny(device).compile()
    crop, mask = crop_and_mask(32, 1, device)

    def made(seed: int) -> bool:
        on_cuda = device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_cuda else nullcontext()
        with stream:
            found = generator.inpaint(crop, mask, seed=seed % 5).cpu()
        return torch.allclose(found, wanted[seed % 5], rtol=0, atol=1e-4)

    with full_float32(device.type):
        wanted = [plain.inpaint(crop, mask, seed=seed).cpu() for seed in range(5)]
        with ThreadPoolExecutor(4) as pool:
            right = list(pool.map(made, range(40)))
    assert all(right), f"{right.count(False)} of {len(right)} tumours are another thread's"
    assert generator.compiled is not None and generator.compiled.works


def check_deterministic_mode_runs(device: torch.device) -> None:
    """No operator without a deterministic kernel; the same call twice gives the same bits."""
    image, label = (x.to(device) for x in scan(2))
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("hu2023", "tiny", "liver-early"):
            synth = ts.SynthesizeTumor(tiny(device) if name == "tiny" else name, size_mm=9.0)
            made = [synth(image, label, spacing=1.0, seed=0)[0] for _ in range(2)]
            assert torch.equal(made[0], made[1]), name
            assert any(record["applied"] for record in synth.report), synth.report
    finally:
        torch.use_deterministic_algorithms(False)


def check_convolutions_avoid_tf32_by_themselves(device: torch.device) -> None:
    """As exact as with the process's setting, which stays as it is."""
    generator, (crop, mask) = ways.tiny(codes=0).to(device), crop_and_mask(32, 1, device)
    generator.precision = "float32"
    made = generator.prepare(crop, mask, seed=0).cond
    with full_float32(device.type):
        wanted = generator.prepare(crop, mask, seed=0).cond
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


def check_compiled_is_eager(device: torch.device) -> None:
    """CUDA graphs included: any batch, one seed after the other."""
    plain, generator = tiny(device), tiny(device).compile()
    for batch in (1, 3, 8, 1):
        crop, mask = crop_and_mask(32, batch, device)
        with full_float32(device.type):
            for seed in (0, 1, 2):
                made = generator.inpaint(crop, mask, seed=seed)
                wanted = plain.inpaint(crop, mask, seed=seed)
                torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
    assert generator.compiled is not None and generator.compiled.works


def check_samples_go_through_together(device: torch.device) -> None:
    generator, sizes = tiny(device), []
    inner = generator.change

    def change(crop: Tensor, mask: Tensor, **how: Any) -> Tensor:
        sizes.append(len(crop))
        return inner(crop, mask, **how)

    generator.change = change  # type: ignore[method-assign]
    image, label = (x.to(device) for x in scan(8))
    synth = ts.SynthesizeTumor(generator, count=1, size_mm=8.0, contrast_hu=-60.0)  # painted once
    synth(image, label, spacing=1.0, seed=0)
    assert sizes == ([1] * 8 if device.type == "cpu" else [8]), sizes


def check_settings_stay(device: torch.device) -> None:
    """TF32, cuDNN's choices, the random streams: as they were."""

    def settings() -> list[object]:
        cudnn = torch.backends.cudnn
        return [
            cudnn.allow_tf32,
            cudnn.benchmark,
            cudnn.deterministic,
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().tolist(),
            torch.cuda.get_rng_state().tolist() if device.type == "cuda" else None,
        ]

    synth = ts.SynthesizeTumor(tiny(device), count=2, size_mm=8.0)  # its weights are random
    image, label = (x.to(device) for x in scan(1))
    before = settings()
    synth(image, label, spacing=1.0, seed=0)
    assert settings() == before


def check_painting_never_waits(device: torch.device) -> None:
    """torch raises where the program would wait for the GPU."""
    generator, (crop, mask) = tiny(device), crop_and_mask(32, 2, device)
    for run in (generator.change, generator.inpaint):
        run(crop, mask, seed=0, contrast_hu=-30.0)  # what is loaded at first may wait
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            run(crop, mask, seed=1, contrast_hu=-30.0)
            run(crop, mask, seed=[1, 2], contrast_hu=[-30.0, -40.0])
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def check_a_call_waits_a_few_times(device: torch.device) -> None:
    """As often as counted on a pretended device, by torch's own watch."""
    image, label = (x.to(device) for x in scan(1))
    for tumours in (1, 2):
        synth = ts.SynthesizeTumor(tiny(device), count=tumours, size_mm=8.0)
        synth(image, label, spacing=1.0, seed=0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                synth(image, label, spacing=1.0, seed=0)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        waits = [f"{w.filename}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]
        assert len(waits) <= CALL + TUMOUR * tumours, f"{tumours} tumours wait: {waits}"


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    parser = arguments(__doc__, "gpu_checks")
    help = "the check that compiles, which takes longer than all others"
    parser.add_argument(
        "--compiled", choices=("with", "without", "alone"), default="with", help=help
    )
    args = parse(parser)
    kinds = {"with": (False, True), "without": (False,), "alone": (True,)}[args.compiled]
    failed, rows = 0, []
    for check in CHECKS:
        if ("compiled" in check.__name__) not in kinds:
            continue
        start = time.perf_counter()
        try:
            check(args.device)
            word, error = "ok", None
        except Exception:  # the next one may tell more
            error = traceback.format_exc()
            failed, word = failed + 1, "FAILED\n" + error
        name, seconds = check.__name__.removeprefix("check_").replace("_", " "), time.perf_counter()
        seconds = round(seconds - start, 1)
        print(f"{name}: {word} ({seconds} s)", flush=True)
        rows.append({"check": name, "ok": error is None, "s": seconds, "error": error})
        write(args.output, {"device": str(args.device), "rows": rows})
    sys.exit(failed)


if __name__ == "__main__":
    main()
