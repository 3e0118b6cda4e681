"""Make phantom_preview.png, here."""

from __future__ import annotations

from pathlib import Path

import tumorsynth as ts
from tumorsynth.preview import save_preview

ct = ts.make_phantom(seed=1)
synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=20, count=2, size_mm=(14, 20))
image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=4)
save_preview(
    Path(__file__).parent / "phantom_preview.png",
    ct.image[0].numpy(),
    image[0].numpy(),
    (label != ct.label)[0].numpy(),
    ct.affine,
    synth.report,
    title="phantom, liver-early",
)
print(synth.report)
