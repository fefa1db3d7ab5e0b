"""Where fluxkern's ops run inside models of other packages; no maths, only wiring."""
