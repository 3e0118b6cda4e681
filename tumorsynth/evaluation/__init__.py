"""Does it help, and does it look real? Scores of segmentations, healthy scans, likeness of tumours.

Needs ``pip install "tumorsynth[evaluation]"``. Synthesis imports none of it.
"""
