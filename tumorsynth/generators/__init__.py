"""What generates a tumour in a crop: diffusion networks or a hand-crafted rule, and their files."""
