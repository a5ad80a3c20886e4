"""clipbench: what does my backbone know?

Importing this package is cheap: torch and OpenMMLab load only when something is run.
"""

__version__ = "0.1.0"
