"""The compact FLUX: captioned drawings, their judge, training, and the weights that ship."""
