"""Where a tumour sits, how large it is, and which voxels it takes."""
