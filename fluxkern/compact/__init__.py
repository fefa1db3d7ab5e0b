"""The compact FLUX: captioned drawings, their judge, training, and the weights that ship."""

STEPS, FEW_STEPS = 16, 4  # of base and dev; of schnell
GUIDANCE, DEV_GUIDANCE = 2.0, 3.5  # of base in two passes; of dev in one, as FLUX.1 dev's
