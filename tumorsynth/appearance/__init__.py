"""What a tumour looks like in its scan: contrast, noise, edges, background, mass effect."""
