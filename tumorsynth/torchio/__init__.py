"""Tumour synthesis as TorchIO transforms.

    tio.Compose([
        tio.ToCanonical(), tio.Resample(1),
        # on HU, before any rescaling; after it with intensity=ts.Scaled(-175, 250, 0, 1)
        RandomSynthesizeTumor(image="ct", label="organs", p=0.5),
        tio.RescaleIntensity((0, 1), in_min_max=(-175, 250)),
    ])

`RandomSynthesizeTumor` draws from torch's global generator, as TorchIO does. The subject's
history then holds the arguments of a `SynthesizeTumor` that makes the same tumours again: a
few numbers and names. TorchIO 2, an alpha so far, has transforms of another form. The installed
release decides which module this one imports.
"""

from __future__ import annotations

try:
    import torchio
except ImportError as error:
    raise ImportError(
        'tumorsynth.torchio needs TorchIO: pip install "tumorsynth[torchio]"'
    ) from error

if int(torchio.__version__.split(".")[0]) < 2:
    from tumorsynth.torchio.torchio1 import RandomSynthesizeTumor, SynthesizeTumor
else:
    from tumorsynth.torchio.torchio2 import RandomSynthesizeTumor, SynthesizeTumor

__all__ = ["RandomSynthesizeTumor", "SynthesizeTumor"]
