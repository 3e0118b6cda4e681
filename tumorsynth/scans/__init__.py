"""Whole scans on disk: NIfTI files, pairing, single scans, collections, replay, previews."""
