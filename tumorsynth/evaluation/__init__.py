"""Evaluate: score segmentations, select healthy scans, compare real and synthetic tumours.

Needs ``pip install "tumorsynth[evaluation]"``. Synthesis never imports this package.
"""
