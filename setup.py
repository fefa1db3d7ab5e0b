"""The build of fluxkern. Pure Python so far: everything is in pyproject.toml."""

from setuptools import setup

setup()
