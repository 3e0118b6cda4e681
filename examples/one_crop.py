"""Synthesise tumours in one CT volume with plain PyTorch, report them, and replay them exactly.

    python examples/one_crop.py

Writes one_crop.png. Takes a few seconds on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import tumorsynth as ts
from tumorsynth.scans.preview import save_preview

ct = ts.make_phantom(spacing=(1.5, 1.5, 3.0), seed=0)  # yours: (1, X, Y, Z) in Hounsfield units
synth = ts.SynthesizeTumor(organ_labels=1, tumor_label=20, count=2, size_mm=(10, 20))

image, label = synth(ct.image, ct.label, spacing=ct.spacing, seed=3)
for tumor in synth.report:
    print({key: tumor[key] for key in ("centre_voxel", "diameter_mm", "hu_change", "generator")})

again, _ = synth(ct.image, ct.label, spacing=ct.spacing, params=synth.params)
assert again.equal(image)

picture = Path("one_crop.png")
new = (label != ct.label)[0].numpy()
save_preview(picture, ct.image[0].numpy(), image[0].numpy(), new, ct.affine, synth.report)
print(f"before and after: {picture}")
