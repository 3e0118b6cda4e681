"""Tumour synthesis as TorchIO transforms.

    tio.Compose([
        tio.ToCanonical(), tio.Resample(1),
        RandomSynthesizeTumor(image="ct", label="organs", p=0.5),   # on HU: before any rescaling,
        tio.RescaleIntensity((0, 1), in_min_max=(-175, 250)),       # or after, intensity=Scaled()
    ])

:class:`RandomSynthesizeTumor` draws from torch's global generator, as TorchIO does, and enters the
subject's history with the arguments of :class:`SynthesizeTumor`, a few numbers and names, that make
the same tumours again. TorchIO 2, an alpha so far, has transforms of another form: which file holds
them depends on the release that is installed.
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
