"""Placement: where each tumour sits, how large it is, and which voxels it takes.

Start with `place.place`. It takes an `organ.OrganRegion` and `settings.PlacementSettings`, and
returns one `types.LocalMask` or `types.Skip` per tumour.
"""
