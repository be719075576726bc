"""Studies: a named grid of arms and seeds, run in parallel, resumed where it stopped, reported in docs/studies."""
