"""Analysis: spectra, ranks, noise floors and reports of the differences of two checkpoints."""
